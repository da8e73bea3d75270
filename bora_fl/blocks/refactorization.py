"""Refactorization: the best block factors of a given rank for a merged update of higher rank."""

from __future__ import annotations

from dataclasses import dataclass

from bora_fl.blocks.cores import compress_stack
from bora_fl.blocks.factors import BlockFactors, blocked, unblocked
from bora_fl.blocks.gauge import truncate
from bora_fl.blocks.least_squares import Fit, fit_from


@dataclass(frozen=True)
class Refactorization:
    """A fit of block factors to an update.

    Args:
        factors: The fit.
        relative_error: `‖M − fit‖ / ‖M‖`.
        history: Relative error at the start and after every sweep, never increasing.
    """

    factors: BlockFactors
    relative_error: float
    history: tuple[float, ...]


def refactorize(
    factors: BlockFactors,
    rank: int,
    *,
    start: BlockFactors | None = None,
    sigma_transform: str = "identity",
    sweeps: int = 50,
    tolerance: float = 1e-3,
) -> Refactorization:
    """Fit block factors of the given rank to an update."""
    left, sigma, right = blocked(factors)
    rows, target, columns = compress_stack(left, sigma, right)
    first = start if start is not None else truncate(factors, rank)
    start_left, start_sigma, start_right = blocked(first)
    seed = Fit(rows.project(start_left), start_sigma, columns.project(start_right))
    fit, history = fit_from(target, seed, sweeps, tolerance)
    result = unblocked(rows.expand(fit.left), fit.sigma, columns.expand(fit.right), first.scaling, factors.B.dtype)
    return Refactorization(result, history[-1], tuple(history))
