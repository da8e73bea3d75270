"""One client's local training: AdamW or SGD on what the round trains, and nothing else."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bora_fl.client.losses import divergence, not_true_divergence
from bora_fl.client.optimizers import make_optimizer, num_steps
from bora_fl.client.share import Share
from bora_fl.config import TrainSettings
from bora_fl.data import Encoded, draw_batches
from bora_fl.device import autocast, settle
from bora_fl.evaluate import example_losses, num_targets, preference_losses
from bora_fl.models import FederatedModel
from bora_fl.seeds import derive

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Mean loss over the round's steps, optimizer steps, examples drawn, seconds."""

    loss: float
    steps: int
    examples: int
    seconds: float


@dataclass(frozen=True)
class _Part:
    """A batch, or this process's share of it; targets and examples of the whole batch.

    An idle part is another process's row, which is passed through the model and counts for nothing.
    """

    batch: dict[str, Tensor]
    targets: int
    examples: int
    idle: bool = False


def train(
    model: FederatedModel,
    data: Encoded,
    settings: TrainSettings,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    factors: Sequence[float] = (1.0,),
    seed: int,
    shift: Tensor | None = None,
    hold: float = 0.0,
    on_step: Callable[[int, int], None] | None = None,
    share: Share | None = None,
) -> TrainResult:
    """Train what `FederatedModel.train_only` has chosen for one round.

    Args:
        model: Holds the received state; is trained in place.
        data: The client's training examples.
        settings: Steps, batches, optimizer, clipping, FedProx, FedNTD.
        optimizer: Over what trains now; left out, a fresh one from `make_optimizer` and `factors`.
        factors: Shares of the learning rate, from `learning_rate_factors`; unused if there is an optimizer.
        seed: Seeds the batches and dropout.
        shift: ``[C]``, added to the logits (`losses.prior_shift`).
        hold: β of `losses.divergence` from the received model.
        on_step: Called with (step, steps) after each step; what it raises ends the training.
        share: This process's, where several train together.

    Raises:
        FloatingPointError: If the loss stops being finite; nothing of that round is kept.
    """
    started = time.perf_counter()
    device = settle(model.model)
    parameters = model.trained_parameters()
    optimizer = optimizer or make_optimizer(model, settings, factors)
    anchors = [p.detach().clone() for p in parameters] if settings.proximal_mu else []
    steps = num_steps(settings, len(data))
    count = steps * settings.accumulation
    batches = _parts(data, settings, count, seed, share)
    teaches = bool(settings.not_true_distillation or hold)
    received = iter(_logits(model, _parts(data, settings, count, seed, share), settings) if teaches else ())
    torch.manual_seed(derive(seed, "process", share.rank) if share and share.rank else seed)
    model.model.train()
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    total, examples = 0.0, 0
    for step in range(1, steps + 1):
        parts = [next(batches) for _ in range(settings.accumulation)]
        taught = [next(received) if teaches else None for _ in parts]
        examples += sum(part.examples for part in parts)
        scale = math.inf
        while scaler.get_scale() < scale:  # gradients that overflowed are taken again with a loss of half the scale
            scale = scaler.get_scale()
            optimizer.zero_grad(set_to_none=True)
            loss = _backward(model, parts, taught, settings, shift, hold, scaler)
            if share:
                loss = share.add_up(parameters, loss)
            if not math.isfinite(loss) or scale < 1:
                raise FloatingPointError(
                    f"the loss, or its gradient in half precision, became {loss} in step {step} of {steps}; lower "
                    f"train.learning-rate ({settings.learning_rate}) or set train.max-grad-norm "
                    f"({settings.max_grad_norm})"
                )
            scaler.unscale_(optimizer)
            for parameter, anchor in zip(parameters, anchors, strict=False):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - anchor, alpha=settings.proximal_mu)
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
        total += loss
        if share:
            share.report(on_step, step, steps)
        elif on_step:
            on_step(step, steps)
    return TrainResult(total / steps, steps, examples, time.perf_counter() - started)


def _parts(data: Encoded, settings: TrainSettings, count: int, seed: int, share: Share | None) -> Iterator[_Part]:
    """The round's batches, the same for the same seed."""
    drawn = draw_batches(
        len(data),
        settings.batch_size,
        count,
        np.random.default_rng(seed),
        data.lengths,
        settings.length_bucket,
    )
    for indices in drawn:
        whole = data.batch(indices)
        rows = share.rows(indices) if share else indices
        idle = bool(share and share.in_step and not len(rows))
        own = data.batch(indices[:1] if idle else rows) if share else whole
        yield _Part(own, _num_targets(whole), len(whole["labels"]), idle)


def _backward(
    model: FederatedModel,
    parts: Sequence[_Part],
    taught: Sequence[Tensor | None],
    settings: TrainSettings,
    shift: Tensor | None,
    hold: float,
    scaler: torch.amp.GradScaler,
) -> float:
    """The mean loss over all targets of the parts of a step, as far as they are this process's; its scaled gradient is
    added to the parameters'.
    """
    device = next(model.model.parameters()).device
    targets = sum(part.targets for part in parts)
    loss = 0.0
    for part, before in zip(parts, taught, strict=True):
        if not len(part.batch["labels"]):
            continue
        batch = {name: tensor.to(device) for name, tensor in part.batch.items()}
        labels, reference = batch.pop("labels"), batch.pop("reference", None)
        shared = nullcontext() if settings.checkpointing else model.quick_step()
        with autocast(device, settings.precision), shared:
            own = model.forward(**batch).logits
        logits = own if shift is None else own + shift.to(own.device)
        if reference is None:
            losses = example_losses(logits, labels)[0]
        else:
            losses = preference_losses(logits, labels, reference, settings.dpo_beta)[0]
        if before is not None and hold:
            losses = losses + hold * divergence(own, before)
        if before is not None and settings.not_true_distillation:
            losses = losses + settings.not_true_distillation * not_true_divergence(logits, before, labels)
        part_loss = losses.sum() / max(targets, 1) * (not part.idle)
        scaler.scale(part_loss).backward()  # type: ignore[no-untyped-call]
        loss += part_loss.item()
    return loss


def _logits(model: FederatedModel, parts: Iterable[_Part], settings: TrainSettings) -> list[Tensor]:
    """The model's logits of each batch as it is now, without dropout."""
    device = settle(model.model)
    model.model.eval()
    found = []
    with torch.no_grad(), autocast(device, settings.precision):
        for part in parts:
            if not len(part.batch["labels"]):
                found.append(torch.empty(0))
                continue
            inputs = {name: tensor.to(device) for name, tensor in part.batch.items() if name != "labels"}
            found.append(model.model(**inputs).logits.float())
    return found


def _num_targets(batch: Mapping[str, Tensor]) -> int:
    """Targets in a batch, or pairs."""
    if "reference" in batch:
        return len(batch["reference"])
    return num_targets(batch["labels"])
