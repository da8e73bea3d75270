"""Normalize Sigma: the same update with a Sigma that its transform reaches.

`exp_norm` reaches exactly the positive Sigma with `mean|log Sigma| = 1`. Means of such Sigmas, steps of an optimizer
and truncations are positive, but off that mean. The update does not change under `B_i[:, k] · α_ik`,
`A_j[k, :] · β_jk`, `Sigma[i, j, k] / (α_ik β_jk)`, so Sigma is moved along this freedom as little as it takes
(`sigma_range.into_range`): by one common factor that B gives back or, where the mean is too large, by shrinking what
rows (and columns) explain. Order, signs and, where it can be, A stay as they are, so that what clients or the server
remember of the factors still fits them.
"""

from __future__ import annotations

from typing import Literal

import torch

from bora_fl.blocks.factors import BlockFactors, rescaled
from bora_fl.blocks.refactorization import refactorize
from bora_fl.blocks.resizing import padded, truncate
from bora_fl.blocks.sigma_range import into_range

_ROUNDING = 8  # mean|log Sigma| may be this many units of the dtype's rounding off 1 and is left alone


def normalize_sigma(factors: BlockFactors, sigma_transform: str, keep: Literal["A", "B"] = "A") -> BlockFactors:
    """The same update with a Sigma that the transform can reach.

    Args:
        factors: Any factors.
        sigma_transform: `"exp_norm"`, or `"identity"`: every Sigma is in its range, and one block is brought to
            plain LoRA's form, Sigma = 1.
        keep: The factor that stays as it is wherever the other can take what Sigma gives.

    Returns:
        Factors of the same update up to rounding; the given ones if their Sigma is in range. Under `exp_norm`, where no
        scaling reaches the range (a Sigma that is not positive, or block pairs that differ by too much, which takes
        clients that disagree wildly), the closest fit that is in it.
    """
    if keep == "B":
        return transposed(normalize_sigma(transposed(factors), sigma_transform))
    if sigma_transform == "identity":
        return _plain(factors) if factors.num_blocks == 1 else factors
    if bool((factors.sigma > 0).all()):
        log = factors.sigma.double().log()
        if abs(float(log.abs().mean()) - 1) <= _ROUNDING * torch.finfo(factors.sigma.dtype).eps:
            return factors
        everywhere = torch.ones_like(log, dtype=torch.bool)
        for columns in (False, True):
            try:
                shifted = into_range(log, everywhere, columns)
            except ValueError:
                continue
            rows = (log - shifted).mean(1)
            # Where rows do it all, what is left is rounding, and A stays as it is.
            shares = (log - shifted - rows[:, None]).mean(0) if columns else torch.zeros_like(rows)
            return rescaled(factors, rows.exp(), shares.exp())
    return refactorize(factors, factors.rank, start=factors, sigma_transform="exp_norm").factors


def at_rank(factors: BlockFactors, rank: int, sigma_transform: str) -> BlockFactors:
    """Factors of another rank that a model of this transform can take.

    A smaller rank gets the components of most energy as they are, without a fit: they keep their coordinates, so that
    clients of several ranks can be averaged. A larger rank gets components that start at zero.

    Args:
        factors: A layer's factors.
        rank: The rank wanted, at least 1.
        sigma_transform: Of the adapter.
    """
    if factors.rank == rank:
        return factors
    resized = truncate(factors, rank) if rank < factors.rank else padded(factors, rank)
    return normalize_sigma(resized, sigma_transform)


def transposed(factors: BlockFactors) -> BlockFactors:
    """Factors of the transposed update: B and A exchange roles."""
    B, sigma, A = factors.A.T.contiguous(), factors.sigma.transpose(0, 1).contiguous(), factors.B.T.contiguous()
    return BlockFactors(B, sigma, A, factors.scaling)


def _plain(factors: BlockFactors) -> BlockFactors:
    if bool((factors.sigma == 1).all()):
        return factors
    B = factors.B.double() * factors.sigma.double()[0, 0]
    return BlockFactors(B.to(factors.B.dtype), torch.ones_like(factors.sigma), factors.A, factors.scaling)
