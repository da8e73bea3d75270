"""The best B for a given A and Sigma, without a basis, a core or a norm of the update that is fitted.

With Sigma and A kept, `min over B of Σ_ij ‖M_ij − B_i diag(Sigma_ij) A_j‖²` has one small normal equation a block row,

    B_i (Σ_j D_ij A_j A_jᵀ D_ij) = Σ_j M_ij A_jᵀ D_ij,   D_ij = diag(Sigma_ij),

whose right side is a sum over the parts of M: they are visited a few at a time, so that neither time nor memory grows
with the square of their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bora_fl.blocks.factors import BlockFactors, blocked, unblocked
from bora_fl.blocks.gauge import block_row_norms, fix_gauge, sigma_scales
from bora_fl.blocks.least_squares import proximal_solve

_GROUP_RANK = 256  # components taken at a time
_ROUNDING = 8


def fit_left(
    parts: Sequence[BlockFactors], weights: Sequence[float], start: BlockFactors, sigma_transform: str
) -> BlockFactors | None:
    """Fit B to `M = Σ_k w_k delta_W^k`, leaving the start's A and Sigma as they are.

    Args:
        parts: Block factors of one shape and block count, of any ranks.
        weights: One per part, used as they are.
        start: Factors of the rank wanted. The fit is never worse.
        sigma_transform: `"identity"`, or `"exp_norm"` for a Sigma that must be one of its values.

    Returns:
        The fit in canonical form (`gauge`), in the start's dtype; None if no gauge brings the start's Sigma into the
        transform's range.
    """
    left, sigma, right = blocked(start)
    normal = torch.einsum("ijk,jkl,ijl->ikl", sigma, right.mT @ right, sigma)
    goal, mass = torch.zeros_like(left), torch.zeros_like(left[:, 0])
    for their_left, their_sigma, their_right in grouped(parts, weights):
        mixed = torch.einsum("ijc,jck,ijk->ick", their_sigma, their_right.mT @ right, sigma)
        goal += their_left @ mixed
        mass += torch.einsum("ic,ick->ik", their_left.norm(dim=1), mixed.abs())
    # What is left where the parts cancel is rounding, and has no direction.
    alive = (goal.norm(dim=1) > _ROUNDING * torch.finfo(goal.dtype).eps * mass).unsqueeze(1)
    goal, left = torch.where(alive, goal, 0.0), torch.where(alive, left, 0.0)
    left = proximal_solve(normal, goal.mT, left.mT).mT
    fitted = unblocked(left, sigma, right, start.scaling or 1.0, torch.float64)
    norms, scales = block_row_norms(start), sigma_scales(start, sigma_transform)
    try:
        fixed = fix_gauge(fitted, sigma_transform=sigma_transform, row_norms=norms, sigma_scale=scales)
    except ValueError:
        return None
    return fixed.to(start.B.dtype)


def grouped(
    parts: Sequence[BlockFactors], weights: Sequence[float], rank: int = _GROUP_RANK
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Stacks `left [b, m/b, R]`, `sigma [b, b, R]` (weights inside), `right [b, n/b, R]` of a few parts each, float64.

    Args:
        parts: Block factors of one shape and block count.
        weights: One per part.
        rank: A stack holds at most this many components, or one part.
    """
    group: list[tuple[Tensor, Tensor, Tensor]] = []
    held = 0
    for factors, weight in zip(parts, weights, strict=True):
        if group and held + factors.rank > rank:
            yield _stacked(group)
            group, held = [], 0
        left, sigma, right = blocked(factors)
        group.append((left, sigma * float(weight), right))
        held += factors.rank
    if group:
        yield _stacked(group)


def _stacked(group: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    left, sigma, right = (torch.cat(tensors, dim=2) for tensors in zip(*group, strict=True))
    return left, sigma, right
