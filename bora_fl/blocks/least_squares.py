"""Alternating least squares for block factors.

    min over (B, Sigma, A) of rank r of  Σ_ij ‖M_ij − B_i diag(Sigma_ij) A_j‖²

Each of B, A and Sigma alone is a linear least-squares problem with small normal equations, so a sweep over the three
never increases the error. Every solve is proximal: a ridge, tiny against the normal equations' diagonal, pulls to the
present value instead of to zero. It keeps the error monotone, leaves alone what the target says nothing about (A while
B = 0) and settles duplicated components.

Components are kept with unit columns in every `B_i` and `A_jᵀ`; Sigma then carries the energy of every block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bora_fl.blocks.targets import Target

_PROXIMAL = 1e-12  # relative to each unknown's own curvature: far above float64 rounding, far below any signal


@dataclass(frozen=True)
class Fit:
    """Block factors in a target's coordinates: `left [b, k, r]`, `sigma [b, b, r]`, `right [b, l, r]`."""

    left: Tensor
    sigma: Tensor
    right: Tensor

    @property
    def T(self) -> Fit:  # noqa: N802 - the transpose's usual name
        """The fit of the transposed target."""
        return Fit(self.right, self.sigma.transpose(0, 1), self.left)


def normalized(fit: Fit) -> Fit:
    """The same update with unit columns in left and right; zero columns stay as they are."""
    left, left_norm = _unit_columns(fit.left)
    right, right_norm = _unit_columns(fit.right)
    return Fit(left, fit.sigma * left_norm.unsqueeze(1) * right_norm.unsqueeze(0), right)


def _unit_columns(blocks: Tensor) -> tuple[Tensor, Tensor]:
    norm = blocks.norm(dim=1)
    norm = torch.where(norm > 0, norm, 1.0)
    return blocks / norm.unsqueeze(1), norm


def relative_error_of(target: Target, fit: Fit) -> float:
    """`‖M − fit‖ / ‖M‖`.

    From inner products where that is accurate; where the fit is so good that they cancel, from explicit residual
    blocks, one block row at a time.
    """
    if target.squared_norm == 0:
        return 0.0 if float(fit.sigma.abs().max()) == 0 else math.inf
    cross = (target.diagonal(fit.left, fit.right) * fit.sigma).sum()
    gram_left, gram_right = fit.left.mT @ fit.left, fit.right.mT @ fit.right
    own = torch.einsum("ikl,ijk,jkl,ijl->", gram_left, fit.sigma, gram_right, fit.sigma)
    squared = float(target.squared_norm - 2 * cross + own) / target.squared_norm
    if squared < 1e-8:
        residual = 0.0
        for i in range(fit.sigma.shape[0]):
            fitted = (fit.left[i] * fit.sigma[i].unsqueeze(1)) @ fit.right.mT
            residual += float((target.row(i) - fitted).square().sum())
        squared = residual / target.squared_norm
    return math.sqrt(max(squared, 0.0))


def proximal_solve(normal: Tensor, rhs: Tensor, present: Tensor) -> Tensor:
    """Solve `normal x = rhs`, pulled to `present`: `[…, r, r]`, `[…, r, c]`, `[…, r, c]` -> `[…, r, c]`."""
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    floor = diagonal.amax(-1, keepdim=True) * 1e-30
    scale = torch.where(diagonal > floor, diagonal, 1.0).rsqrt().unsqueeze(-1)
    scaled = normal * scale * scale.mT
    ridge = torch.full_like(diagonal, _PROXIMAL).masked_fill(diagonal <= floor, 1.0)
    scaled = scaled + torch.diag_embed(ridge)
    pull = ridge.unsqueeze(-1) * present / scale
    return torch.cholesky_solve(rhs * scale + pull, torch.linalg.cholesky(scaled)) * scale


def update_left(target: Target, fit: Fit) -> Fit:
    """Best left factors for the present Sigma and right factors."""
    gram = fit.right.mT @ fit.right
    normal = torch.einsum("ijk,jkl,ijl->ikl", fit.sigma, gram, fit.sigma)
    rhs = target.apply(fit.right, fit.sigma)
    left = proximal_solve(normal, rhs.mT, fit.left.mT).mT
    return normalized(replace(fit, left=left))


def update_sigma(target: Target, fit: Fit, floor: float | None = None) -> Fit:
    """Best Sigma for the present left and right factors.

    With a floor, best subject to `Sigma ≥ floor` where the unconstrained optimum allows it, and otherwise better than
    before: coordinate descent from the present Sigma.
    """
    normal = (fit.left.mT @ fit.left).unsqueeze(1) * (fit.right.mT @ fit.right).unsqueeze(0)
    rhs = target.diagonal(fit.left, fit.right)
    sigma = proximal_solve(normal, rhs.unsqueeze(-1), fit.sigma.unsqueeze(-1)).squeeze(-1)
    if floor is not None:
        bounded = _coordinate_descent(normal, rhs, fit.sigma.clamp_min(floor), floor)
        sigma = torch.where((sigma >= floor).all(-1, keepdim=True), sigma, bounded)
    return replace(fit, sigma=sigma)


def _coordinate_descent(normal: Tensor, rhs: Tensor, present: Tensor, floor: float, passes: int = 3) -> Tensor:
    """Lower `xᵀ normal x − 2 rhsᵀ x` subject to `x ≥ floor`, from a feasible `present`."""
    x = present.clone()
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    for _ in range(passes):
        for k in range(x.shape[-1]):
            slope = rhs[..., k] - (normal[..., k, :] * x).sum(-1)
            curvature = diagonal[..., k]
            step = torch.where(curvature > 0, slope / curvature.clamp_min(1e-300), 0.0)
            x[..., k] = (x[..., k] + step).clamp_min(floor)
    return x


@dataclass(frozen=True)
class Constraints:
    """What a fit must satisfy.

    Args:
        floor: Smallest value of Sigma while columns have unit norm; none allows every sign.
        only_left: Leave Sigma and the right factors as they are.
    """

    floor: float | None = None
    only_left: bool = False


def sweep(target: Target, fit: Fit, constraints: Constraints) -> Fit:
    """One pass over left, right and Sigma."""
    fit = update_left(target, fit)
    if constraints.only_left:
        return fit
    fit = update_left(target.T, fit.T).T
    return update_sigma(target, fit, constraints.floor)


def fit_from(
    target: Target, start: Fit, sweeps: int, tolerance: float, constraints: Constraints | None = None
) -> tuple[Fit, list[float]]:
    """Sweep from a start until the error falls by less than `tolerance` of itself.

    Between sweeps a longer step along the last change is tried and kept if it lowers the error, which shortens the long
    valleys of alternating least squares.

    Returns:
        The best fit and the relative error before the first and after every sweep, never increasing.
    """
    constraints = constraints or Constraints()
    fit = normalized(start)
    history = [relative_error_of(target, fit)]
    stretch, error = 1.0, history[0]
    for _ in range(sweeps):
        previous, error_before = fit, error
        candidate = sweep(target, fit, constraints)
        error = relative_error_of(target, candidate)
        if not error < error_before:
            error = error_before
            break
        fit = candidate
        gain = (error_before - error) / error_before
        if gain >= tolerance and len(history) > 2 and not constraints.only_left:
            longer = _extrapolated(previous, fit, stretch, constraints.floor)
            longer_error = relative_error_of(target, longer)
            if longer_error < error:
                fit, error = longer, longer_error
                stretch = min(2 * stretch, 64.0)
            else:
                stretch = max(stretch / 2, 0.5)
        history.append(error)
        if gain < tolerance:
            break
    return fit, history


def _extrapolated(previous: Fit, fit: Fit, stretch: float, floor: float | None) -> Fit:
    left = fit.left + stretch * (fit.left - previous.left)
    right = fit.right + stretch * (fit.right - previous.right)
    sigma = fit.sigma + stretch * (fit.sigma - previous.sigma)
    longer = normalized(Fit(left, sigma, right))
    return longer if floor is None else replace(longer, sigma=longer.sigma.clamp_min(floor))
