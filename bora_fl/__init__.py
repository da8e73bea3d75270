"""Federated fine-tuning with BoRA adapters (block-diversified low-rank adaptation).

Importing this package makes PEFT know BoRA, without importing PEFT: `bora_fl.adapters` is imported right after `peft`.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bora_fl.api import compare, export, load, predict, simulate

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "export", "load", "predict", "simulate"]
_API = frozenset(__all__[1:])  # imported when they are asked for: importing this package costs no library

# `kernels/` and `simulations/` stand at the top of a checkout and of a Flower App Bundle, yet are imported as
# `bora_fl.kernels` and `bora_fl.simulations`: Hugging Face publishes a package that is imported as `kernels`.
# A wheel already holds both folders inside the package.
_root = Path(__file__).resolve().parent.parent
if not (Path(__file__).resolve().parent / "kernels").is_dir() and (_root / "kernels" / "reference.py").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module("bora_fl.api"), name)
    raise AttributeError(f"module 'bora_fl' has no attribute {name!r}")


def federate(trainer: Any, model: Any = None) -> Any:
    """Make a Flower ClientApp of an existing training script.

    Args:
        trainer: A ``transformers.Trainer``, or one derived from it such as TRL's ``SFTTrainer`` or ``DPOTrainer``,
            whose model has a BoRA or LoRA adapter like the run's (``adapter.*`` of the run config). The federation's
            rounds cut its run into equal parts. Or, with `model`, a function ``(round, rounds)`` that trains the model
            for a round and returns a mapping with ``num_examples`` (its weight in the merge, 1 by default), ``steps``
            and ``train_loss``, or None.
        model: The PEFT model that the function trains; it holds the merged adapter when the function is called.

    Returns:
        The ClientApp, for ``clientapp`` in the app's pyproject.toml. Runs with differential privacy are refused.

    Raises:
        ValueError: If the model has no adapter, or there is a model and no function.
    """
    from bora_fl.client.bridge import federate

    return federate(trainer, model)


class _RegisterAfterPeft(MetaPathFinder):
    """Imports the adapters as soon as PEFT's own import is done; merely looking for PEFT imports nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                sys.meta_path.remove(self)
                importlib.import_module("bora_fl.adapters")

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("bora_fl.adapters")
else:
    sys.meta_path.insert(0, _RegisterAfterPeft())
