"""DP-SGD on a client: Poisson batches, per-sample clipping over all trained tensors jointly, Gaussian noise.

One step, with sampling rate q, clipping norm C, noise multiplier z and expected batch size L = q · records:

    draw S, every record independently with probability q
    g = (Σ_{s in S} g_s · min(1, C / |g_s|)  +  N(0, (z C)²)) / L

(Abadi et al., 2016, arXiv:1607.00133.) The divisor is the expected batch size: the drawn one is private. An empty S
takes a step of noise alone, since a skipped step would tell that S was empty. The optimizer sees g only: any will do.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bora_fl.client.per_sample import SampleGradients
from bora_fl.privacy.accounting import Unit
from bora_fl.privacy.gaussian import Randomness, SystemRandomness, add_noise, poisson_sample, require_mechanism


class Records(Protocol):
    """A data set that is indexed by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Diagnostics:
    """What happened, computed from the records without noise: not private, not to leave the client.

    Attributes:
        mean_loss: Over all samples drawn; NaN if none was.
        samples: Number of samples drawn, over all steps.
        empty_batches: Steps that drew nobody.
        clipped_fraction: Share of the samples whose gradient was scaled down.
        dropped: Samples whose gradient was not finite and counted as zero.
    """

    mean_loss: float
    samples: int
    empty_batches: int
    clipped_fraction: float
    dropped: int


@dataclass(frozen=True)
class PrivateTraining:
    """What was spent, and what happened.

    Attributes:
        noise_multiplier: z.
        clip_norm: C.
        sample_rate: q.
        steps: Noised steps taken.
        diagnostics: Not private, see there.
        unit: Whose presence the noise hides.
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    steps: int
    diagnostics: Diagnostics
    unit: Unit = "record"


@dataclass
class _Tally:
    loss: float = 0.0
    samples: int = 0
    empty: int = 0
    clipped: int = 0
    dropped: int = 0

    def diagnostics(self) -> Diagnostics:
        samples = self.samples
        return Diagnostics(
            mean_loss=self.loss / samples if samples else math.nan,
            samples=samples,
            empty_batches=self.empty,
            clipped_fraction=self.clipped / samples if samples else 0.0,
            dropped=self.dropped,
        )


def train_privately(
    model: nn.Module,
    sample_losses: Callable[[nn.Module, Any], Tensor],
    records: Records,
    collate: Callable[[list[Any]], Any],
    optimizer: torch.optim.Optimizer,
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    physical_batch_size: int,
    steps: int,
    spend: Callable[[float, float, int], object] | None,
    randomness: Randomness | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> PrivateTraining:
    """Take noised steps on a client's records.

    Args:
        model: The model, in training mode; parameters that require gradients are trained.
        sample_losses: `(model, batch)` to one loss per sample, `[samples]`. A sample's loss must not depend on the
            others (see `bora_fl.client.losses`).
        records: The client's records.
        collate: Makes a batch, on the model's device, of a non-empty list of records.
        optimizer: Holds exactly the trained parameters; sees the noised gradients in their `grad`.
        clip_norm: C, the bound of a record's gradient over all trained tensors together. Infinity turns clipping off
            and needs `noise_multiplier` 0: the gradients are then those of plain SGD on the batch, bit for bit.
        noise_multiplier: z, in multiples of `clip_norm`.
        expected_batch_size: L, above 0 and at most the number of records; the sampling rate is `L / len(records)`.
        physical_batch_size: Largest number of samples in memory at once.
        steps: Noised steps to take, at least 1.
        spend: Called with `(noise_multiplier, sample_rate, steps)` before the first record is read, such as
            `Ledger.spend`; what it raises stops the training. None keeps no account.
        randomness: Source of noise and sampling. Left out, the operating system's; a seeded source is for simulations.
        on_step: Called with (step, steps) after each step; what it raises ends the training.

    Returns:
        What was spent, and diagnostics that are not private.

    Raises:
        ValueError: If a setting is out of range, or the model and the optimizer do not fit.
        RuntimeError: If `sample_losses` does not return one loss per sample, or per-sample gradients are incomplete.
    """
    require_mechanism(clip_norm, noise_multiplier)
    if not 0 < expected_batch_size <= len(records):
        raise ValueError(
            f"expected_batch_size = {expected_batch_size} with {len(records)} records: use a value above 0 and at most "
            "the number of records, and leave a client without records out"
        )
    if physical_batch_size < 1 or steps < 1:
        raise ValueError(f"physical_batch_size = {physical_batch_size}, steps = {steps}: both are at least 1")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _require_same_parameters(trained, optimizer)
    sample_rate = expected_batch_size / len(records)
    randomness = randomness or SystemRandomness()
    if spend is not None:
        spend(noise_multiplier, sample_rate, steps)
    tally = _Tally()
    with SampleGradients(model) if math.isfinite(clip_norm) else nullcontext() as collector:
        for step in range(1, steps + 1):
            optimizer.zero_grad(set_to_none=True)
            drawn = poisson_sample(len(records), sample_rate, randomness)
            tally.samples += len(drawn)
            tally.empty += not drawn
            sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
            for start in range(0, len(drawn), physical_batch_size):
                chosen = [records[index] for index in drawn[start : start + physical_batch_size]]
                losses = sample_losses(model, collate(chosen))
                _require_one_loss_per_sample(losses, len(chosen))
                tally.loss += float(losses.detach().sum())
                if collector is None:
                    torch.autograd.backward(losses.sum() / expected_batch_size)
                else:
                    torch.autograd.backward(losses.sum())
                    _add_clipped(sums, trained, collector.take(len(chosen)), clip_norm, tally)
            for parameter, clipped_sum in zip(trained, sums, strict=True):
                if collector is not None:
                    noised = add_noise(clipped_sum, noise_multiplier * clip_norm, randomness)
                    parameter.grad = (noised / expected_batch_size).to(parameter.dtype)
                elif parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            if on_step:
                on_step(step, steps)
    optimizer.zero_grad(set_to_none=True)
    return PrivateTraining(noise_multiplier, clip_norm, sample_rate, steps, tally.diagnostics())


def _add_clipped(
    sums: list[Tensor],
    trained: list[nn.Parameter],
    gradients: dict[nn.Parameter, Tensor],
    clip_norm: float,
    tally: _Tally,
) -> None:
    """Add `Σ_s g_s · min(1, C / |g_s|)` to the sums; a gradient that is not finite counts as zero.

    Products and sums are in the sums' dtype, at least float32: a sum in bfloat16 drops what is small beside it, and one
    record then moves it by up to 1.65 C.
    """
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64).square() for g in gradients.values()]
    if not squares:
        return
    norms = torch.stack(squares).sum(dim=0).sqrt()
    finite = norms.isfinite()
    # A zero norm gives an infinite quotient, and the factor 1.
    factors = (clip_norm / norms).clamp(max=1.0)
    dropped = int((~finite).sum())
    tally.dropped += dropped
    tally.clipped += int((factors[finite] < 1).sum())
    for parameter, total in zip(trained, sums, strict=True):
        gradient = gradients.get(parameter)
        if gradient is None:
            continue
        if dropped:
            gradient = gradient[finite]
        total += (factors[finite].to(total.dtype) @ gradient.flatten(1).to(total.dtype)).view_as(total)


def _require_same_parameters(trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if {id(p) for p in held} != {id(p) for p in trained}:
        raise ValueError(
            f"optimizer: it holds {len(held)} trained tensors where the model has {len(trained)}, or others; give it "
            "exactly the model's parameters that require gradients, so that all are clipped together and noised"
        )


def _require_one_loss_per_sample(losses: Tensor, samples: int) -> None:
    if losses.shape != (samples,):
        raise RuntimeError(
            f"sample_losses returned the shape {tuple(losses.shape)} for {samples} samples; return one per sample, "
            "such as bora_fl.client.losses.sample_losses does"
        )
