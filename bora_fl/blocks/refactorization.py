"""Refactorization: the best block factors of a given rank for a merged update of higher rank.

    min over (B, Sigma, A) of rank r of  Σ_ij ‖M[i, j] − B_i diag(Sigma[i, j]) A_j‖²

For one block that is the truncated SVD. For more it is not an SVD, and is solved by alternating least squares on the
cores of M (`least_squares`), warm from a given start, cold from the target alone (`initial_guess`), or both with the
better one kept. Sigma can be kept in `exp_norm`'s range (`sigma_range`). The result is in canonical form (`gauge`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bora_fl.blocks.block_cores import BlockCores, compressed
from bora_fl.blocks.cores import Compressed, compress_stack_and
from bora_fl.blocks.factors import BlockFactors, blocked, unblocked
from bora_fl.blocks.gauge import block_row_norms, check_transform, fix_gauge, positive_signs, sigma_scales
from bora_fl.blocks.initial_guess import cold_starts
from bora_fl.blocks.least_squares import Constraints, Fit, fit_from, normalized, relative_error_of
from bora_fl.blocks.metrics import distance
from bora_fl.blocks.resizing import padded, truncate
from bora_fl.blocks.sigma_range import least_floor
from bora_fl.blocks.svd import leading_svd
from bora_fl.blocks.targets import Target

# How near zero a positive Sigma may come, as a share of its root mean square (with unit columns). A fit without a floor
# pushes single entries to 1e-7; mean|log Sigma| = 1 then leaves others in the hundreds, and local training from there
# diverges. Freshly initialized entries are at .05 or above.
_SMALLEST_SIGMA = 0.02
_CANDIDATE_SWEEPS = 10
_RANGE_ROUNDS = 3


@dataclass(frozen=True)
class Refactorization:
    """A fit of block factors to an update.

    Args:
        factors: The fit, in canonical form, in the dtype of what was fitted.
        relative_error: `‖M − fit‖ / ‖M‖`, rounding to that dtype included; zero if both vanish.
        history: Relative error of the kept fit at its start and after every sweep, never increasing.
        start_error: Relative error of the given start, None without one. `relative_error` is not above it but for
            rounding, unless the start breaks a constraint that the fit keeps.
        origin: Where the kept fit comes from: `"start"`, `"cold"`, `"svd"`, `"truncated"`, `"exact"` (rank suffices).
    """

    factors: BlockFactors
    relative_error: float
    history: tuple[float, ...]
    start_error: float | None
    origin: str


def refactorize(
    factors: BlockFactors | BlockCores,
    rank: int,
    *,
    start: BlockFactors | None = None,
    cold: int | None = None,
    sigma_transform: str = "identity",
    only_B: bool = False,
    sweeps: int = 50,
    tolerance: float = 1e-3,
) -> Refactorization:
    """Fit block factors of a given rank to an update.

    Args:
        factors: The update M: stacked factors of any rank, or the cores of a streaming merge.
        rank: Rank r of the fit, at least 1.
        start: Where the warm fit starts, of rank r: the clients' factor mean, say. The fit is never worse.
        cold: Attempts of the cold start against noise, each costing several times a warm fit; the best of all is kept.
            The cheap algebraic guess is tried as well unless this is 0. Default: 0 with a start, 2 without.
        sigma_transform: `"identity"`, or `"exp_norm"` for a Sigma that must be one of its values.
        only_B: Leave the start's A and Sigma as they are and solve for B alone, which takes one solve: clients train
            well from where they trained before, and a fit of all three moves to where they do not.
        sweeps: Most sweeps of alternating least squares.
        tolerance: Stop when a sweep lowers the error by less than this fraction of itself.

    Returns:
        The fit with its errors; its scaling and the norms of A's rows are the start's, else the stack's and those of a
        fresh initialization.

    Raises:
        ValueError: If the rank or an option is out of range, or the start does not fit the update.
    """
    check_transform(sigma_transform)
    _check(factors, rank, start, only_B)
    if isinstance(factors, BlockFactors) and factors.rank <= rank:
        factors = padded(factors, rank)
        exact = None if only_B else _exact(factors, start, sigma_transform)
        if exact is not None:
            return exact
    whole, warm = _compressed_with(factors, start)
    target = whole.target
    size = math.sqrt(target.squared_norm)
    if size == 0:
        return _vanishing(factors, rank, start)
    # One block needs no floor: scaling its components alone brings any positive Sigma into range.
    bounded = sigma_transform == "exp_norm" and target.num_blocks > 1
    floor = _floor(size, target.num_blocks, rank, warm) if bounded else None
    constraints = Constraints(floor, only_B)

    start_error = None
    candidates: list[tuple[str, Fit]] = []
    if warm is not None:
        start_error = relative_error_of(target, warm)
        candidates.append(("start", warm))
    attempts = (2 if start is None else 0) if cold is None else cold
    if only_B:
        attempts = 0
    elif target.num_blocks == 1:
        candidates = [("svd", leading_svd(target, rank))]
    elif attempts > 0 or start is None:
        if isinstance(factors, BlockFactors):
            candidates.append(("truncated", _coordinates(truncate(factors, rank), whole)))
        candidates.append(("svd", leading_svd(target, rank)))
        candidates += [("cold", fit) for fit in cold_starts(target, rank, attempts)]

    feasible = [(origin, _feasible(fit, constraints)) for origin, fit in candidates]
    origin, fit, history = _best(target, feasible, constraints, sweeps, tolerance)
    if floor is not None:
        origin, fit, history = _in_range(target, feasible[0][1], (origin, fit, history), constraints, sweeps, tolerance)
    unrounded, dtype = _expanded(fit, whole, start, factors), _dtype(factors)
    result = _canonical(unrounded, origin, start, sigma_transform).to(dtype)
    rounding = 0.0 if dtype == torch.float64 else distance(unrounded, result) / size
    return Refactorization(result, math.hypot(history[-1], rounding), tuple(history), start_error, origin)


def _check(update: BlockFactors | BlockCores, rank: int, start: BlockFactors | None, only_b: bool) -> None:
    if rank < 1:
        raise ValueError(f"rank is {rank}; give at least 1")
    if only_b and start is None:
        raise ValueError("only_B keeps the start's A and Sigma; give a start")
    if start is not None and (start.shape, start.num_blocks, start.rank) != (update.shape, update.num_blocks, rank):
        raise ValueError(
            f"start is of a {start.shape} weight in {start.num_blocks} blocks and has rank {start.rank}; the fit is of"
            f" a {update.shape} one in {update.num_blocks} and has rank {rank}: give a start that fits"
        )


def _dtype(update: BlockFactors | BlockCores) -> torch.dtype:
    return update.B.dtype if isinstance(update, BlockFactors) else update.rows.dtype


def _exact(factors: BlockFactors, start: BlockFactors | None, sigma_transform: str) -> Refactorization | None:
    """The update itself in canonical form, unless its Sigma is out of range."""
    try:
        canonical = _canonical(factors, "exact", None, sigma_transform)
    except ValueError:
        return None
    size = factors.norm()
    error = distance(factors, canonical) / size if size > 0 else 0.0
    start_error = None
    if start is not None:
        start_error = distance(factors, start) / size if size > 0 else (0.0 if start.norm() == 0 else math.inf)
    return Refactorization(canonical, error, (error,), start_error, "exact")


def _vanishing(update: BlockFactors | BlockCores, rank: int, start: BlockFactors | None) -> Refactorization:
    """The fit of a zero update: B = 0, with the start's A and Sigma, so that it can be trained."""
    if start is None:
        m, n = update.shape
        b = update.num_blocks
        like = update.B if isinstance(update, BlockFactors) else update.rows
        nothing = BlockFactors(like.new_zeros(m, 0), like.new_zeros(b, b, 0), like.new_zeros(0, n))
        factors, start_error = padded(nothing, rank), None
    else:
        factors = BlockFactors(torch.zeros_like(start.B), start.sigma, start.A, start.scaling).to(_dtype(update))
        start_error = 0.0 if start.norm() == 0 else math.inf
    return Refactorization(factors, 0.0, (0.0,), start_error, "exact")


def _compressed_with(update: BlockFactors | BlockCores, start: BlockFactors | None) -> tuple[Compressed, Fit | None]:
    """The update as a target, and the start in its coordinates; a stack's bases are made to hold the start."""
    if start is None:
        return compressed(update), None
    left, sigma, right = blocked(start)
    if isinstance(update, BlockFactors):
        whole, left, right = compress_stack_and(*blocked(update), left, right)
        return whole, Fit(left, sigma, right)
    whole = compressed(update)
    return whole, _coordinates(start, whole)


def _coordinates(factors: BlockFactors, whole: Compressed) -> Fit:
    left, sigma, right = blocked(factors)
    return Fit(whole.rows.project(left), sigma, whole.columns.project(right))


def _feasible(fit: Fit, constraints: Constraints) -> Fit:
    """The nearest cheap fit that keeps the constraints."""
    fit = normalized(fit)
    if constraints.floor is not None:
        row, column = positive_signs(fit.sigma * fit.sigma.abs(), fit.right)
        sigma = (fit.sigma * row.unsqueeze(1) * column.unsqueeze(0)).clamp_min(constraints.floor)
        fit = Fit(fit.left * row.unsqueeze(1), sigma, fit.right * column.unsqueeze(1))
    return fit


def _floor(size: float, num_blocks: int, rank: int, warm: Fit | None) -> float:
    """The least Sigma under `exp_norm`: no higher than the start's own least, so that a start can be kept."""
    floor = _SMALLEST_SIGMA * size / math.sqrt(num_blocks**2 * rank)
    if warm is not None:
        sigma = normalized(warm).sigma
        alive = sigma[_alive(warm) & (sigma > 0)]
        if alive.numel():
            floor = min(floor, float(alive.min()))
    return floor


_Candidate = tuple[str, Fit, list[float]]


def _best(
    target: Target, starts: list[tuple[str, Fit]], constraints: Constraints, sweeps: int, tolerance: float
) -> _Candidate:
    """Sweep all starts a little, then the best one to the end."""
    if starts[0][0] == "svd" and target.num_blocks == 1:
        return "svd", starts[0][1], [relative_error_of(target, starts[0][1])]
    best: _Candidate | None = None
    few = min(sweeps, _CANDIDATE_SWEEPS) if len(starts) > 1 else sweeps
    for origin, start in starts:
        fit, history = fit_from(target, start, few, tolerance, constraints)
        if best is None or history[-1] < best[2][-1]:
            best = origin, fit, history
    assert best is not None
    origin, fit, history = best
    fit, more = fit_from(target, fit, sweeps - few, tolerance, constraints)
    return origin, fit, history + more[1:]


def _in_range(
    target: Target, start: Fit, fitted: _Candidate, constraints: Constraints, sweeps: int, tolerance: float
) -> _Candidate:
    """Raise a floor under Sigma until the gauge can bring it into `exp_norm`'s range, refitting above it."""

    def needed(fit: Fit) -> float:
        return least_floor(fit.sigma, _alive(fit))

    origin, fit, history = fitted
    floor = needed(fit)
    if floor == 0:
        return fitted
    best: tuple[Fit, list[float]] | None = None
    for _ in range(_RANGE_ROUNDS):
        raised = replace(fit, sigma=fit.sigma.clamp_min(floor))
        fit, history = fit_from(target, raised, sweeps, tolerance, replace(constraints, floor=floor))
        kept = replace(fit, sigma=fit.sigma.clamp_min(needed(fit)))
        error = relative_error_of(target, kept)
        if best is None or error < best[1][-1]:
            best = kept, [*(e for e in history if e > error), error]
        floor = max(floor, needed(fit))
    assert best is not None
    start_error = relative_error_of(target, start)
    if start_error < best[1][-1] and needed(start) == 0:
        return "start", start, [start_error]
    return origin, *best


def _alive(fit: Fit) -> Tensor:
    rows, columns = fit.left.norm(dim=1) > 0, fit.right.norm(dim=1) > 0
    alive: Tensor = rows.unsqueeze(1) & columns.unsqueeze(0)
    return alive


def _expanded(
    fit: Fit, whole: Compressed, start: BlockFactors | None, update: BlockFactors | BlockCores
) -> BlockFactors:
    """The fit as factors in float64; a block row of A that vanished is replaced, so that it can be trained."""
    scaling = start.scaling if start is not None else (update.scaling if isinstance(update, BlockFactors) else 1.0)
    left, right = whole.rows.expand(fit.left), whole.columns.expand(fit.right)
    gone = fit.right.norm(dim=1) == 0
    if bool(gone.any()):
        b, q, r = right.shape
        generator = torch.Generator().manual_seed(r)
        fresh = blocked(start)[2] if start is not None else torch.randn(b, q, r, generator=generator).to(right)
        right = torch.where(gone.unsqueeze(1), fresh, right)
        dead = gone.all(0)
        left = torch.where(dead, 0.0, left)
        sigma = torch.where(gone.unsqueeze(0) & ~dead, 0.0, fit.sigma)
        fit = replace(fit, sigma=sigma)
    return unblocked(left, fit.sigma, right, scaling or 1.0, torch.float64)


def _canonical(factors: BlockFactors, origin: str, start: BlockFactors | None, sigma_transform: str) -> BlockFactors:
    """The canonical form, at the start's scale: component by component if the fit comes from it, else pooled."""
    norms: Tensor | None = None
    scale: Tensor | None = None
    if origin == "exact":
        start = factors
    if start is not None:
        norms, scale = block_row_norms(start), sigma_scales(start, sigma_transform)
        if origin not in ("start", "exact"):
            norms = norms.square().mean().sqrt().expand_as(norms)
            scale = scale.log().mean().exp() if bool((scale > 0).all()) else torch.ones(())
    return fix_gauge(factors, sigma_transform=sigma_transform, row_norms=norms, sigma_scale=scale)
