"""Settings of a language model's run that fit a device, each with its reason."""

from dataclasses import dataclass, replace
from typing import Any

from bora_fl.config import ConfigError, Settings
from bora_fl.planning.memory import Estimate, estimate

RUNTIME = 0.7e9
"""Bytes that a CUDA context and its libraries take; assumed."""
_USABLE = 0.9  # share of a device's memory; the rest is lost between the allocator's blocks
_MOST_SEQUENCES = 16  # a step's, over all accumulated batches
_FEW_SEQUENCES = 4  # below which a batch leaves a GPU idle, so that less memory for each is worth its price
_STEPS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "what is fastest fits: frozen weights in bfloat16, no recomputation"),
    ({"checkpointing": True}, "without gradient checkpointing fewer than 4 sequences fit; it costs about a third"),
    (
        {"quantization": "4bit"},
        "in bfloat16 fewer than 4 sequences fit, with gradient checkpointing too; NF4 takes a quarter of the memory",
    ),
    (
        {"quantization": "4bit", "checkpointing": True},
        "neither NF4 nor gradient checkpointing alone leaves room for 4 sequences",
    ),
)


@dataclass(frozen=True)
class Advice:
    """Settings that fit, and why.

    Attributes:
        run_config: By key.
        reasons: A sentence for each decision.
        estimate: What a step takes with them.
    """

    run_config: dict[str, bool | int | str]
    reasons: tuple[str, ...]
    estimate: Estimate


def advise(settings: Settings, config: Any, memory: float) -> Advice:
    """The first of a few settings, from the fastest to the smallest, with which enough sequences fit.

    Args:
        settings: The run's; model, adapter, data and lengths are taken as they are.
        config: transformers' config of the base model.
        memory: Of the device, in bytes.

    Raises:
        ConfigError: If not one sequence fits.
    """
    room, fallback = _USABLE * memory - RUNTIME, None
    for changes, reason in _STEPS:
        tried = _with(settings, changes)
        found = estimate(tried, config)
        fits = int((room - replace(found, batch=0).total) // (found.sequence + found.logits))
        if fits >= 1:
            choice = (tried, found, 1 << (min(fits, _MOST_SEQUENCES).bit_length() - 1), reason)
            if fits >= _FEW_SEQUENCES:
                return _advice(*choice)
            fallback = choice if fallback is None or fits > fallback[2] else fallback
    if fallback is None:
        raise ConfigError(
            f"--gpu {memory / 1e9:.0f}GB with model.max-length = {settings.model.max_length}: not one sequence fits; "
            "lower model.max-length, or take a smaller model"
        )
    return _advice(*fallback[:3], "fewer than 4 sequences fit in any way")


def _with(settings: Settings, changes: dict[str, Any]) -> Settings:
    quantization = changes.get("quantization", "none")
    model = settings.model.model_copy(update={"dtype": "bfloat16", "quantization": quantization})
    update = {"precision": "bf16", "checkpointing": "checkpointing" in changes}
    return settings.model_copy(update={"model": model, "train": settings.train.model_copy(update=update)})


def _advice(settings: Settings, found: Estimate, batch: int, reason: str) -> Advice:
    adapter, accumulation = settings.adapter, _MOST_SEQUENCES // batch
    run_config: dict[str, bool | int | str] = {
        "model.dtype": settings.model.dtype,
        "model.quantization": settings.model.quantization,
        "train.precision": "bf16",
        "train.checkpointing": settings.train.checkpointing,
        "train.batch-size": batch,
        "train.accumulation": accumulation,
        "adapter.num-blocks": adapter.num_blocks,
        "adapter.rank": adapter.rank,
    }
    reasons = (
        reason,
        f"{batch} sequences in memory at once, the largest power of two that fits {_USABLE:.0%} of it; "
        f"{accumulation} such batches make a step of {batch * accumulation}",
        f"b = {adapter.num_blocks}, r = {adapter.rank}: updates of rank up to {adapter.blocks * adapter.rank} for "
        f"{found.trained / 1e6:.2f} M trained parameters, {found.trained / found.parameters:.2%} of the model",
    )
    return Advice(run_config, reasons, replace(found, batch=batch))
