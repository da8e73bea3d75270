"""The canonical form of block factors, and what rests on it.

For any `α [b, r]`, `β [b, r]` without zeros, the factors `B_i[:, k] α_ik`, `A_j[k, :] β_jk`,
`Sigma[i, j, k] / (α_ik β_jk)` are the same update, as is any common permutation of `k`; for more than one block there
is no further freedom (no rotation). The canonical form:

* every block row `A_j[k, :]` has the norm at which clients train it (`row_norms`);
* Sigma has the scale at which clients train it: its root mean square over j (`"identity"`), or its geometric mean
  over j (`"exp_norm"`), is `sigma_scale`; for `"exp_norm"` it is then moved as little as brings it into the
  transform's range (`sigma_range.into_range`), the total norm of every row of A staying what it is;
* B takes the rest;
* the entry of largest magnitude in every row of A (block rows at equal norms) is positive, Sigma is positive where
  signs allow it;
* components stand in order of energy.

A and B are never balanced against each other: B is nearly zero in the first rounds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bora_fl.blocks.factors import BlockFactors, blocked, unblocked
from bora_fl.blocks.sigma_range import into_range

# Expected norm of a row of A after Kaiming-uniform(a=√5): n entries of variance 1 / (3n).
INITIAL_ROW_NORM = 1 / math.sqrt(3)

SIGMA_TRANSFORMS = ("identity", "exp_norm")


def check_transform(sigma_transform: str) -> None:
    """Raise ValueError unless the transform is known."""
    if sigma_transform not in SIGMA_TRANSFORMS:
        raise ValueError(f"sigma_transform is {sigma_transform!r}; use one of {', '.join(SIGMA_TRANSFORMS)}")


def block_row_norms(factors: BlockFactors) -> Tensor:
    """Norm of every block row `A_j[k, :]`, `[b, r]` in float64."""
    norms: Tensor = blocked(factors)[2].norm(dim=1)
    return norms


def sigma_scales(factors: BlockFactors, sigma_transform: str) -> Tensor:
    """Scale of Sigma over j for every block row and component, `[b, r]` in float64 (see the module's text)."""
    size = factors.sigma.double().abs()
    if sigma_transform == "exp_norm":
        return size.clamp_min(torch.finfo(torch.float64).tiny).log().mean(1).exp()
    rms: Tensor = size.square().mean(1).sqrt()
    return rms


def fix_gauge(
    factors: BlockFactors,
    *,
    sigma_transform: str = "identity",
    row_norms: Tensor | float | None = None,
    sigma_scale: Tensor | float | None = None,
) -> BlockFactors:
    """The same update in canonical form.

    Args:
        factors: Any block factors.
        sigma_transform: `"identity"`, or `"exp_norm"` for a Sigma that must be one of its values.
        row_norms: Norm of the rows of A: of every block row (`[b, r]`), of every whole row, shared evenly by its blocks
            (`[r]` or a number). Default: 1/√3, its expectation after Kaiming-uniform initialization.
        sigma_scale: Scale of Sigma over j, `[b, r]` or a number. Default 1.

    Returns:
        Factors of the same update, scaling and dtype. Components without energy keep their A, get B = 0 and a Sigma of
        the stated scale.

    Raises:
        ValueError: If the transform is unknown, or it is `"exp_norm"` and Sigma has signs or a spread that no gauge
            removes.
    """
    check_transform(sigma_transform)
    left, sigma, right = blocked(factors)
    sigma = sigma / (factors.scaling or 1.0)
    target_norm = _block_norms(row_norms, right)
    scale = _as_tensor(1.0 if sigma_scale is None else sigma_scale, right).expand(right.shape[0], right.shape[2])

    left_norm, right_norm = left.norm(dim=1), right.norm(dim=1)
    energy = sigma.abs() * left_norm.unsqueeze(1) * right_norm.unsqueeze(0)
    row_alive, column_alive = energy.amax(1) > 0, energy.amax(0) > 0
    alive = row_alive.unsqueeze(1) & column_alive.unsqueeze(0)
    left = torch.where(row_alive.unsqueeze(1), left, 0.0)

    beta = target_norm / torch.where(right_norm > 0, right_norm, 1.0)
    row_sign, column_sign = positive_signs(torch.where(sigma < 0, -energy, energy), right)
    beta = beta * column_sign
    right = right * beta.unsqueeze(1)
    sigma = sigma / beta.unsqueeze(0) * row_sign.unsqueeze(1)
    left = left * row_sign.unsqueeze(1)

    if sigma_transform == "exp_norm":
        if bool((sigma[alive] <= 0).any()):
            raise ValueError(
                "Sigma has zeros or signs that no gauge removes, exp_norm needs it positive; refactorize with"
                " sigma_transform='exp_norm'"
            )
        log_sigma = torch.where(alive, sigma, 1.0).log()
        mean = log_sigma.mean(1)
        log_scaled = log_sigma + (scale.log() - mean).unsqueeze(1)
        shifted = into_range(torch.where(alive, log_scaled, 0.0), alive)
        row, column = _shifts(log_sigma - shifted, alive)
        # The total norm of a row of A stays: the common part of the column shifts moves to the row shifts.
        norms = right.norm(dim=1)
        total = (norms * column.exp()).square().sum(0).clamp_min(1e-300).sqrt()
        common = total.log() - norms.square().sum(0).clamp_min(1e-300).sqrt().log()
        column, row = column - common, row + common
        right = right * column.exp().unsqueeze(1)
        left = left * row.exp().unsqueeze(1)
        sigma = shifted.exp()
    else:
        rms = sigma.square().mean(1).sqrt()
        alpha = torch.where(rms > 0, rms, 1.0) / scale
        sigma = torch.where((rms > 0).unsqueeze(1), sigma / alpha.unsqueeze(1), scale.unsqueeze(1))
        left = left * alpha.unsqueeze(1)

    order = torch.argsort(energy.square().sum((0, 1)), descending=True, stable=True)
    left, sigma, right = left[..., order], sigma[..., order], right[..., order]
    scaling = factors.scaling or 1.0
    return unblocked(left, sigma * scaling, right, scaling, factors.B.dtype)


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _block_norms(row_norms: Tensor | float | None, right: Tensor) -> Tensor:
    b, _, r = right.shape
    norms = _as_tensor(INITIAL_ROW_NORM if row_norms is None else row_norms, right)
    norms = norms.expand(b, r) if norms.ndim == 2 else (norms / math.sqrt(b)).expand(b, r)
    return torch.where(norms > 0, norms, INITIAL_ROW_NORM / math.sqrt(b))


def positive_signs(weighted: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of rows and columns, `[b, r]` each, that make a signed energy `[b, b, r]` positive, where they can.

    Started from the most energetic row of every component, whose signs are those of the columns if any choice is exact.
    """
    strongest = weighted.abs().sum(1).argmax(0)
    column = torch.where(weighted[strongest, :, torch.arange(weighted.shape[2])].mT < 0, -1.0, 1.0)
    column = column.to(weighted.dtype)
    row = torch.ones_like(column)
    for _ in range(20):
        row = torch.where((weighted * column.unsqueeze(0)).sum(1) < 0, -1.0, 1.0)
        new = torch.where((weighted * row.unsqueeze(1)).sum(0) < 0, -1.0, 1.0)
        if bool((new == column).all()):
            break
        column = new
    signed = right / right.norm(dim=1, keepdim=True).clamp_min(1e-300) * column.unsqueeze(1)
    flat = signed.permute(2, 0, 1).flatten(1)
    peak = flat.gather(1, flat.abs().argmax(1, keepdim=True)).squeeze(1)
    flip = torch.where(peak < 0, -1.0, 1.0)
    return row * flip, column * flip


def _shifts(difference: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column parts `[b, r]` of a difference `[b, b, r]` that is their sum wherever it is alive."""
    known = torch.where(alive, difference, torch.nan)
    row = known.nanmean(1).nan_to_num()
    column = (known - row.unsqueeze(1)).nanmean(0).nan_to_num()
    return row, column
