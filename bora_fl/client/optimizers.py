"""The optimizer of a client's round, and the learning rate of each of its steps."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from bora_fl.config import ConfigError, Settings, TrainSettings
from bora_fl.device import pick_device
from bora_fl.models import FederatedModel


def num_steps(settings: TrainSettings, num_examples: int) -> int:
    """Optimizer steps of a round on that many examples."""
    if settings.local_steps:
        return settings.local_steps
    return max(1, math.ceil(settings.local_epochs * num_examples / (settings.batch_size * settings.accumulation)))


def learning_rate_factors(settings: TrainSettings, round: int, num_rounds: int, steps: int = 1) -> list[float]:
    """The share of ``train.learning-rate`` that each step of a round trains with.

    Warm-up rises linearly over the first ``warmup-rounds``; afterwards ``linear`` and ``cosine`` fall towards 0, which
    they would reach one round (``schedule-by = round``) or one step after the last.

    Args:
        settings: Schedule, warm-up, and what the schedule goes by.
        round: From 1.
        num_rounds: Of the run.
        steps: Of this round; taken as the number of every round's.

    Returns:
        One factor for each step, or a single one for all.
    """
    each = steps if settings.schedule_by == "step" else 1
    before = (round - 1) * each
    return [_factor(settings, before + step, num_rounds * each, settings.warmup_rounds * each) for step in range(each)]


def round_factors(settings: Settings, round: int, num_examples: int) -> list[float]:
    """`learning_rate_factors` of a round of a run, at a client with that many examples."""
    steps = num_steps(settings.train, num_examples)
    return learning_rate_factors(settings.train, round, settings.run.num_rounds, steps)


def _factor(settings: TrainSettings, at: int, total: int, warmup: float) -> float:
    if at < warmup:
        return (at + 1) / (warmup + 1)
    done = (at - warmup) / max(total - warmup, 1)
    if settings.schedule == "linear":
        return 1 - done
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0


def make_optimizer(
    model: FederatedModel, settings: TrainSettings, factors: Sequence[float] = (1.0,)
) -> torch.optim.Optimizer:
    """The round's optimizer over what trains now; B and the head may have learning rates of their own.

    A rate for B that is a multiple of A's is LoRA+ (Hayou, Ghosh, Yu, ICML 2024, arXiv:2402.12354).

    Args:
        model: What trains is chosen.
        settings: Optimizer and learning rates.
        factors: From `learning_rate_factors`; the last one is for all further steps too.

    Raises:
        ConfigError: For a paged optimizer without a CUDA device.
    """
    rate, head_rate = settings.learning_rate, settings.head_learning_rate or settings.learning_rate
    body = model.factor_parameters(frozenset({"A", "sigma"})) + model.other_parameters()
    groups = [
        {"params": body, "lr": rate},
        {"params": model.factor_parameters(frozenset({"B"})), "lr": rate * settings.b_learning_rate_ratio},
        {"params": model.head_parameters(), "lr": head_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    else:
        optimizer = _adamw(settings.optimizer)(groups, lr=rate, weight_decay=settings.weight_decay)
    _follow(optimizer, factors)
    return optimizer


def _adamw(name: str) -> Any:
    """The class that a name of ``train.optimizer`` stands for.

    Raises:
        ConfigError: For pages where there is no GPU whose memory they would leave.
    """
    if name == "adamw":
        return torch.optim.AdamW
    if name.startswith("paged") and pick_device().type != "cuda":
        raise ConfigError(
            f"train.optimizer = {name!r}: there is no CUDA device here, whose memory paged moments could leave; set "
            "train.optimizer to adamw or adamw-8bit"
        )
    import bitsandbytes.optim

    names = {"adamw-8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw-8bit": "PagedAdamW8bit"}
    return getattr(bitsandbytes.optim, names[name])


def _follow(optimizer: torch.optim.Optimizer, factors: Sequence[float]) -> None:
    """Scale the learning rates before each step, whoever takes it."""
    rates, left = [group["lr"] for group in optimizer.param_groups], iter(factors)

    def scale(*_: Any) -> None:
        factor = next(left, factors[-1])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor

    optimizer.register_step_pre_hook(scale)
