"""Factors of another rank, without a fit: fewer components by energy, or more that contribute nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bora_fl.blocks.factors import BlockFactors


def leading_components(factors: BlockFactors, rank: int) -> Tensor:
    """Indices of the `rank` components of most energy, most energetic first and between equals the first."""
    return torch.argsort(factors.component_energy(), descending=True, stable=True)[:rank]


def truncate(factors: BlockFactors, rank: int) -> BlockFactors:
    """Keep the `rank` components of most energy, most energetic first.

    The energy is that of a component alone; `refactorize` to the same rank is better wherever components overlap.

    Args:
        factors: Any block factors.
        rank: Between 1 and `factors.rank`.

    Raises:
        ValueError: If the rank is out of that range.
    """
    if not 1 <= rank <= factors.rank:
        raise ValueError(f"rank is {rank}; choose one between 1 and {factors.rank}, the rank of the factors")
    keep = leading_components(factors, rank)
    return BlockFactors(factors.B[:, keep], factors.sigma[..., keep], factors.A[keep], factors.scaling)


def padded(factors: BlockFactors, rank: int) -> BlockFactors:
    """Add components with B = 0, Sigma = 1 and freshly initialized rows of A, so that they can be trained.

    Args:
        factors: Any block factors.
        rank: At least `factors.rank`.

    Returns:
        Factors of the same update and the given rank; the new rows of A are Kaiming-uniform(a=√5) under a fixed seed.

    Raises:
        ValueError: If the rank is below that of the factors.
    """
    extra = rank - factors.rank
    if extra < 0:
        raise ValueError(f"rank is {rank}; choose at least {factors.rank}, the rank of the factors")
    if extra == 0:
        return factors
    b, (m, n) = factors.num_blocks, factors.shape
    bound = 1 / math.sqrt(n)
    rows = torch.empty(extra, n).uniform_(-bound, bound, generator=torch.Generator().manual_seed(rank))
    return BlockFactors(
        torch.cat([factors.B, factors.B.new_zeros(m, extra)], dim=1),
        torch.cat([factors.sigma, factors.sigma.new_ones(b, b, extra)], dim=2),
        torch.cat([factors.A, rows.to(factors.A)], dim=0),
        factors.scaling,
    )
