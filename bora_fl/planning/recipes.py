"""A recipe: a model by its numbers, the settings of a run, and what the plan says of it."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bora_fl.config import ConfigError, Scalar, Settings, parse

_UNITS = {"gb": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}


@dataclass(frozen=True)
class Recipe:
    """What a file of `recipes/` holds.

    Attributes:
        title: In words.
        status: Whether it was run.
        gpu: The device that it is for, such as ``24GB``.
        source: Where the model's numbers are from.
        config: transformers' config of the model.
        settings: Of the run.
        estimate: What `bora-fl plan` said: gigabytes by part, and counts.
    """

    title: str
    status: str
    gpu: str
    source: str
    config: Any
    settings: Settings
    estimate: dict[str, float]


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: If it cannot be read, or lacks a part.
    """
    from transformers import AutoConfig

    try:
        found = tomllib.loads(path.read_text(encoding="utf8"))
        model = dict(found["architecture"])
        return Recipe(
            found["title"],
            found["status"],
            found["gpu"],
            found["source"],
            AutoConfig.for_model(model.pop("model_type"), **model),
            parse(_flat(found["run-config"])),
            found.get("estimate", {}),
        )
    except (OSError, tomllib.TOMLDecodeError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"recipe {path}: {type(error).__name__}: {error}; docs/training.md shows one") from error


def gigabytes(text: str) -> float:
    """Bytes of a memory such as ``24GB`` or ``80GiB``.

    Raises:
        ConfigError: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"--gpu {text!r}: write a memory such as 24GB")
    return float(match[1]) * _UNITS[match[2]]


def _flat(groups: dict[str, dict[str, Scalar]]) -> dict[str, Scalar]:
    return {f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()}
