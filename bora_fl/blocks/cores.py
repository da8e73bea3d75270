"""Lossless compression of block factors to small cores.

A QR factorization of the stacked left factors of every row block and of the stacked right factors of every column
block gives `M[i, j] = Q_i C[i, j] P_jᵀ` with orthonormal `Q_i`, `P_j` and cores of at most `R × R`; every norm,
distance and fit can be had from the cores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bora_fl.blocks.targets import StackTarget


class Basis:
    """Orthonormal basis of the columns of every block, kept as Householder reflectors.

    Args:
        columns: `[b, p, R]`, any rank.
    """

    def __init__(self, columns: Tensor) -> None:
        self.reflectors, self.tau = torch.geqrf(columns)
        self.dim = min(columns.shape[1], columns.shape[2])

    @property
    def triangle(self) -> Tensor:
        """`[b, min(p, R), R]`: the columns' coordinates in the basis."""
        return self.reflectors[:, : self.dim].triu()

    def expand(self, coordinates: Tensor) -> Tensor:
        """Vectors `[b, p, r]` from coordinates `[b, min(p, R), r]`."""
        b, p, _ = self.reflectors.shape
        full = coordinates.new_zeros(b, p, coordinates.shape[2])
        full[:, : self.dim] = coordinates
        return torch.ormqr(self.reflectors, self.tau, full)

    def project(self, vectors: Tensor) -> Tensor:
        """Coordinates `[b, min(p, R), r]` of the projections of vectors `[b, p, r]`."""
        return torch.ormqr(self.reflectors, self.tau, vectors, transpose=True)[:, : self.dim]


def compress_stack(left: Tensor, sigma: Tensor, right: Tensor) -> tuple[Basis, StackTarget, Basis]:
    """Bases of the row and column blocks, and the stack in their coordinates."""
    rows, columns = Basis(left), Basis(right)
    return rows, StackTarget.of(rows.triangle, sigma, columns.triangle), columns


def stack_norm(left: Tensor, sigma: Tensor, right: Tensor) -> float:
    """Frobenius norm of a stack, accurate to rounding even where its components cancel."""
    return math.sqrt(compress_stack(left, sigma, right)[1].squared_norm)
