"""Distances and errors of updates, from their factors."""

from __future__ import annotations

import math

from bora_fl.blocks.factors import BlockFactors
from bora_fl.blocks.merging import merge


def distance(f: BlockFactors, g: BlockFactors) -> float:
    """Frobenius norm of the difference of two updates, accurate to rounding even when they nearly agree."""
    return merge([f, g], [1.0, -1.0]).norm()


def relative_error(fit: BlockFactors, target: BlockFactors) -> float:
    """`‖target − fit‖ / ‖target‖`; zero when both vanish, infinite when only the target does."""
    error, size = distance(target, fit), target.norm()
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)
