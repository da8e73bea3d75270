"""What a model's adapter may be, judging by its config: a proposal for the user to look over."""

import logging

from bora_fl.config import AdapterSettings, Scalar
from bora_fl.models.base import resolve

log = logging.getLogger(__name__)


def guess_settings(name: str, max_length: int) -> dict[str, Scalar]:
    """Settings of the groups ``model`` and ``adapter`` for a base model.

    Args:
        name: As for ``model.name``.
        max_length: The wanted ``model.max-length``; the model may allow less.

    Returns:
        By ``group.key``: PEFT's usual layers for this kind of model, else all linear layers, and a number of blocks
        that divides its width.

    Raises:
        ConfigError: For an embedded model that is not there.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
    from transformers import AutoConfig

    found: dict[str, Scalar] = {"model.name": name, "model.max-length": max_length}
    if name == "embedded:smollm2":  # its config is there once it is converted, which takes a while
        return found | {"adapter.target-modules": "q_proj,v_proj"}
    try:
        config = AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        log.warning("the config of %s cannot be read, so the adapter goes to all linear layers: %s", name, error)
        return found | {"adapter.target-modules": "all-linear"}
    width = int(getattr(config, "hidden_size", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    key_width = groups * int(getattr(config, "head_dim", None) or width // heads)
    default = AdapterSettings().num_blocks
    found["adapter.num-blocks"] = next(b for b in (default, 4, 2, 1) if width % b == 0 and key_width % b == 0)
    found["adapter.target-modules"] = ",".join(USUAL.get(config.model_type) or ["all-linear"])
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int):
        found["model.max-length"] = min(max_length, positions)
    return found
