"""Changing an adapter's number of blocks, its rank, or its form."""

from __future__ import annotations

import math

import torch

from bora_fl.blocks.factors import BlockFactors
from bora_fl.blocks.refactorization import Refactorization, refactorize


def convert_blocks(
    factors: BlockFactors, num_blocks: int, rank: int | None = None, *, sigma_transform: str = "identity"
) -> BlockFactors:
    """The same update with another number of blocks.

    Exactly, every block is first split so that both divisions are refined: with `g = lcm(b, b')` blocks the rank stays
    r. Joining `h = g / b'` blocks a side into one then takes a component for every (component, place of the column
    block, place of the row block), or for every (component, column block), whichever is fewer: rank
    `r · min(h², b)`. One block gives plain LoRA of rank `b·r`; multiples of b keep the rank.

    Args:
        factors: Any block factors.
        num_blocks: New number of blocks b', a divisor of m and n.
        rank: Rank of the result; None for the exact conversion. A lower rank than that is fitted.
        sigma_transform: Transform the fitted Sigma must be a value of; only with a rank.

    Returns:
        Factors with `num_blocks` blocks.

    Raises:
        ValueError: If `num_blocks` does not divide m and n.
    """
    m, n = factors.shape
    if num_blocks < 1 or m % num_blocks or n % num_blocks:
        raise ValueError(f"num_blocks is {num_blocks}, which does not divide m={m} and n={n}; choose a common divisor")
    b, r = factors.num_blocks, factors.rank
    fine = math.lcm(b, num_blocks)
    joined = fine // num_blocks
    if num_blocks % b == 0:
        exact = _split(factors, num_blocks)
    elif m % fine == 0 and n % fine == 0 and joined**2 < b:
        exact = _joined(_split(factors, fine), joined)
    else:
        lora_b, lora_a = factors.to_lora()
        ones = lora_b.new_ones(num_blocks, num_blocks, b * r)
        exact = BlockFactors(lora_b / (factors.scaling or 1.0), ones, lora_a, factors.scaling or 1.0)
    if rank is None:
        return exact
    return refactorize(exact, rank, sigma_transform=sigma_transform).factors


def _split(factors: BlockFactors, num_blocks: int) -> BlockFactors:
    times = num_blocks // factors.num_blocks
    sigma = factors.sigma.repeat_interleave(times, 0).repeat_interleave(times, 1)
    return BlockFactors(factors.B, sigma, factors.A, factors.scaling)


def _joined(factors: BlockFactors, size: int) -> BlockFactors:
    """Join `size` blocks a side into one: a component for every component and place of the block in its group."""
    b, r = factors.num_blocks, factors.rank
    coarse = b // size
    (m, n), eye = factors.shape, torch.eye(size, dtype=factors.B.dtype, device=factors.B.device)
    left = factors.B.reshape(coarse, size, m // b, 1, 1, r) * eye.reshape(1, size, 1, size, 1, 1)
    right = factors.A.reshape(r, coarse, size, n // b).permute(2, 0, 1, 3)  # [place, r, group, column]
    right = right.unsqueeze(3) * eye.reshape(size, 1, 1, size, 1)
    sigma = factors.sigma.reshape(coarse, size, coarse, size, r).permute(0, 2, 1, 3, 4)
    return BlockFactors(
        left.expand(-1, -1, -1, -1, size, -1).reshape(m, size * size * r),
        sigma.reshape(coarse, coarse, size * size * r),
        right.reshape(1, size * r, n).expand(size, -1, -1).reshape(size * size * r, n),
        factors.scaling,
    )


def compress(
    factors: BlockFactors, rank: int, *, sigma_transform: str = "identity", attempts: int = 2
) -> Refactorization:
    """Compress a trained adapter to a lower rank of the same form, at the scales at which it was trained.

    The truncation by energy, the truncated SVD and the cold starts are all tried and the best is kept.

    Args:
        factors: The adapter.
        rank: Lower rank.
        sigma_transform: Transform Sigma must be a value of.
        attempts: Cold starts against noise.
    """
    norms = factors.A.double().reshape(factors.rank, -1).norm(dim=1).square().mean().sqrt()
    return refactorize(
        factors, rank, cold=attempts, sigma_transform=sigma_transform, reference_norms=norms if norms > 0 else None
    )


def stiefel(factors: BlockFactors, *, sigma_transform: str = "identity", sweeps: int = 50) -> Refactorization:
    """The nearest factors of the same rank whose A_j all have orthonormal rows.

    Exact for one block, where B absorbs the change. For more blocks Sigma stands between B_i and A_j, so that it is a
    fit; its error is in the result.

    Args:
        factors: Any block factors with `r ≤ n / b`.
        sigma_transform: Transform Sigma must be a value of.
        sweeps: Sweeps at most.
    """
    return refactorize(
        factors,
        factors.rank,
        start=factors,
        sigma_transform=sigma_transform,
        orthonormal=True,
        sweeps=sweeps,
    )
