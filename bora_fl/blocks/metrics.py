"""Distances and errors of updates, from their factors."""

from __future__ import annotations

import math

import torch

from bora_fl.blocks.block_cores import compressed
from bora_fl.blocks.factors import BlockFactors
from bora_fl.blocks.merging import merge
from bora_fl.blocks.svd import singular_values


def distance(f: BlockFactors, g: BlockFactors) -> float:
    """Frobenius norm of the difference of two updates, accurate to rounding even when they nearly agree."""
    return merge([f, g], [1.0, -1.0]).norm()


def relative_error(fit: BlockFactors, target: BlockFactors) -> float:
    """`‖target − fit‖ / ‖target‖`; zero when both vanish, infinite when only the target does."""
    error, size = distance(target, fit), target.norm()
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def effective_rank(update: BlockFactors) -> float:
    """How many directions an update uses: the exponential of its singular values' entropy.

    `exp(−Σ p_i log p_i)` with `p = σ / Σ σ` (Roy and Vetterli, EUSIPCO 2007): between 1 and the rank, at most `b r`; 0
    for an update that vanishes.
    """
    values = singular_values(compressed(update).target)
    if not (total := float(values.sum())) > 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
