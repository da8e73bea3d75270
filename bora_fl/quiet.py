"""What libraries say whatever a run does, and that no user can do anything about."""

import logging
import warnings


def quiet() -> None:
    """Switch it off in this process; before bitsandbytes is imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a CPU kernel to fetch
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 with transformers 5.23
