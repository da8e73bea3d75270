"""Refactorization: the best block factors of a given rank for a merged update of higher rank.

    min over (B, Sigma, A) of rank r of  Σ_ij ‖M[i, j] − B_i diag(Sigma[i, j]) A_j‖²

For one block that is the truncated SVD. For more it is not an SVD, and is solved by alternating least squares on the
cores of M (`least_squares`), warm from a given start, cold from the target alone (`initial_guess`), or both with the
better one kept. Sigma can be kept in `exp_norm`'s range (`sigma_range`) and A in Stiefel form. The result is in the
stated gauge (`gauge`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bora_fl.blocks.cores import Compressed, compress_stack
from bora_fl.blocks.factors import BlockFactors, blocked, unblocked
from bora_fl.blocks.gauge import block_row_norms, check_transform, fix_gauge, sigma_scales, truncate
from bora_fl.blocks.initial_guess import cold_starts
from bora_fl.blocks.least_squares import Constraints, Fit, fit_from, normalized, relative_error_of
from bora_fl.blocks.merging import merge
from bora_fl.blocks.metrics import distance
from bora_fl.blocks.sigma_range import least_floor
from bora_fl.blocks.streaming import BlockCores
from bora_fl.blocks.targets import Target

_SMALLEST_SIGMA = 1e-8  # relative to the largest: how near zero a positive Sigma may come before the range is imposed
_CANDIDATE_SWEEPS = 10


@dataclass(frozen=True)
class Refactorization:
    """A fit of block factors to an update.

    Args:
        factors: The fit, in the stated gauge, in the dtype of what was fitted.
        relative_error: `‖M − fit‖ / ‖M‖`, rounding to that dtype included; zero if both vanish.
        history: Relative error of the kept fit at its start and after every sweep, never increasing.
        warm_error: Relative error of the given start, None without one. `relative_error` is never above it but for
            rounding, unless the start breaks a constraint that the fit must keep.
        origin: Where the kept fit started: `"svd"` (one block), `"start"`, `"cold"` or `"exact"` (the rank suffices).
    """

    factors: BlockFactors
    relative_error: float
    history: tuple[float, ...]
    warm_error: float | None
    origin: str


def refactorize(
    factors: BlockFactors | BlockCores,
    rank: int,
    *,
    start: BlockFactors | None = None,
    cold: int | None = None,
    sigma_transform: str = "identity",
    orthonormal: bool = False,
    sweeps: int = 50,
    tolerance: float = 1e-3,
    reference_norms: Tensor | float | None = None,
    scaling: float | None = None,
) -> Refactorization:
    """Fit block factors of a given rank to an update.

    Args:
        factors: The update M: stacked factors of any rank, or the cores of a streaming merge.
        rank: Rank r of the fit, at least 1.
        start: Where the warm fit starts, of rank r: the clients' factor mean, say. The fit is never worse.
        cold: Attempts of the cold start, each costing several times a warm fit; the best of all is kept. Default: none
            with a start, two without. The cheap algebraic guess is tried whenever this is not zero.
        sigma_transform: `"identity"`, or `"exp_norm"` for a Sigma that must be one of its values.
        orthonormal: Keep the rows of every A_j orthonormal (Stiefel form), which bounds the gradient of B.
        sweeps: Most sweeps of alternating least squares.
        tolerance: Stop when a sweep lowers the error by less than this fraction of itself.
        reference_norms: Norms of A's rows in the stated gauge, as in `fix_gauge`. Default: the start's, component by
            component, or without a start those of a fresh initialization.
        scaling: Scaling of the fit. Default: the start's, else that of the stack.

    Returns:
        The fit with its errors.

    Raises:
        ValueError: If the rank or an option is out of range, or the start does not fit the update.
    """
    check_transform(sigma_transform)
    _check(factors, rank, start, orthonormal)
    problem = _Problem.of(factors, rank, start, sigma_transform, orthonormal)
    target, constraints = problem.compressed.target, problem.constraints

    warm_error = None
    candidates: list[tuple[str, Fit]] = []
    if start is not None:
        warm = problem.coordinates(start)
        warm_error = relative_error_of(target, warm)
        candidates.append(("start", warm))
    attempts = (0 if start is not None else 2) if cold is None else cold
    if factors.num_blocks == 1 and not orthonormal:
        candidates = [("svd", _by_svd(target, rank))]
    elif attempts > 0 or start is None:
        candidates += [("cold", fit) for fit in cold_starts(target, rank, attempts)]

    origin, fit, history = _best(target, candidates, constraints, sweeps, tolerance)
    if sigma_transform == "exp_norm":
        fit, history = _in_range(target, fit, history, constraints, sweeps, tolerance)
    result = problem.stated(fit, origin, reference_norms, scaling)
    error = math.hypot(history[-1], problem.rounding(fit, result) / math.sqrt(target.squared_norm or 1.0))
    return Refactorization(result, error, tuple(history), warm_error, origin)
