"""Inner products, distances and errors of updates, from their factors."""

from __future__ import annotations

import math

import torch

from bora_fl.blocks.factors import BlockFactors, blocked
from bora_fl.blocks.merging import merge


def inner(f: BlockFactors, g: BlockFactors) -> float:
    """Frobenius inner product `<f, g>` of two updates of one shape and block count, in float64.

    `Σ_ij Σ_kl Sigma_f[i,j,k] (B_fᵀ B_g)_i[k,l] (A_f A_gᵀ)_j[k,l] Sigma_g[i,j,l]`.
    """
    left_f, sigma_f, right_f = blocked(f)
    left_g, sigma_g, right_g = blocked(g)
    gram_left, gram_right = left_f.mT @ left_g, right_f.mT @ right_g
    return float(torch.einsum("ikl,ijk,jkl,ijl->", gram_left, sigma_f, gram_right, sigma_g))


def distance(f: BlockFactors, g: BlockFactors) -> float:
    """Frobenius norm of the difference of two updates, accurate to rounding even when they nearly agree."""
    return merge([f, g], [1.0, -1.0]).norm()


def relative_error(fit: BlockFactors, target: BlockFactors) -> float:
    """`‖target − fit‖ / ‖target‖`; zero when both vanish, infinite when only the target does."""
    error, size = distance(target, fit), target.norm()
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)
