"""Lossless compression of block factors to small cores.

A QR factorization of the stacked left factors of every row block and of the stacked right factors of every column
block gives `M[i, j] = Q_i C[i, j] P_jᵀ` with orthonormal `Q_i`, `P_j` and cores of at most `R × R`; every norm,
distance and fit can be had from the cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bora_fl.blocks.targets import CoreTarget, StackTarget, Target


class Basis(Protocol):
    """Orthonormal vectors, a set for every block."""

    def expand(self, coordinates: Tensor) -> Tensor:
        """Vectors `[b, p, r]` from coordinates `[b, k, r]`."""
        ...

    def project(self, vectors: Tensor) -> Tensor:
        """Coordinates `[b, k, r]` of the projections of vectors `[b, p, r]`."""
        ...


class HouseholderBasis:
    """Basis of the columns `[b, p, R]` of every block, kept as reflectors: half the cost of the vectors themselves."""

    def __init__(self, columns: Tensor) -> None:
        self.reflectors, self.tau = torch.geqrf(columns)
        self.dim = min(columns.shape[1], columns.shape[2])

    @property
    def triangle(self) -> Tensor:
        """`[b, min(p, R), R]`: the columns' coordinates in the basis."""
        return self.reflectors[:, : self.dim].triu()

    def expand(self, coordinates: Tensor) -> Tensor:
        """See `Basis.expand`."""
        b, p, _ = self.reflectors.shape
        full = coordinates.new_zeros(b, p, coordinates.shape[2])
        full[:, : self.dim] = coordinates
        return torch.ormqr(self.reflectors, self.tau, full)

    def project(self, vectors: Tensor) -> Tensor:
        """See `Basis.project`."""
        return torch.ormqr(self.reflectors, self.tau, vectors, transpose=True)[:, : self.dim]


@dataclass(frozen=True)
class ExplicitBasis:
    """Orthonormal `vectors [b, p, k]`."""

    vectors: Tensor

    def expand(self, coordinates: Tensor) -> Tensor:
        """See `Basis.expand`."""
        return self.vectors @ coordinates

    def project(self, vectors: Tensor) -> Tensor:
        """See `Basis.project`."""
        return self.vectors.mT @ vectors


class Identity:
    """The unit vectors: coordinates are the vectors themselves."""

    def expand(self, coordinates: Tensor) -> Tensor:
        """See `Basis.expand`."""
        return coordinates

    def project(self, vectors: Tensor) -> Tensor:
        """See `Basis.project`."""
        return vectors


@dataclass(frozen=True)
class Compressed:
    """A block matrix `rows_i target_ij columns_jᵀ` of the weight's size, kept in pieces."""

    rows: Basis
    target: Target
    columns: Basis


def compress_stack(left: Tensor, sigma: Tensor, right: Tensor) -> Compressed:
    """Compress the stack `left [b, p, R]`, `sigma [b, b, R]`, `right [b, q, R]` losslessly."""
    if _fills(left, right):
        return Compressed(Identity(), _target(left, sigma, right), Identity())
    rows, columns = HouseholderBasis(left), HouseholderBasis(right)
    return Compressed(rows, _target(rows.triangle, sigma, columns.triangle), columns)


def _target(left: Tensor, sigma: Tensor, right: Tensor) -> Target:
    """The stack, or its cores where they are the smaller form."""
    b, k, rank = left.shape
    width = right.shape[1]
    if rank * (k + width + b) <= b * k * width:
        return StackTarget.of(left, sigma, right)
    cores = left.new_empty(b, b, k, width)
    for i in range(b):  # a block at a time: the stack's components are many here
        for j in range(b):
            torch.mm(left[i] * sigma[i, j], right[j].mT, out=cores[i, j])
    return CoreTarget.of(cores)


def _fills(left: Tensor, right: Tensor) -> bool:
    """Whether a stack has as many components as its blocks have rows and columns: then no basis is smaller."""
    return left.shape[2] >= max(left.shape[1], right.shape[1])


def compress_stack_and(
    left: Tensor, sigma: Tensor, right: Tensor, extra_left: Tensor, extra_right: Tensor
) -> tuple[Compressed, Tensor, Tensor]:
    """Compress a stack in bases that span further vectors too, and return those vectors' coordinates."""
    if _fills(left, right):
        return compress_stack(left, sigma, right), extra_left, extra_right
    rows = HouseholderBasis(torch.cat([left, extra_left], dim=2))
    columns = HouseholderBasis(torch.cat([right, extra_right], dim=2))
    size = sigma.shape[2]
    inner_left, outer_left = rows.triangle.tensor_split([size], dim=2)
    inner_right, outer_right = columns.triangle.tensor_split([size], dim=2)
    whole = Compressed(rows, _target(inner_left, sigma, inner_right), columns)
    return whole, outer_left, outer_right


def stack_norm(left: Tensor, sigma: Tensor, right: Tensor) -> float:
    """Frobenius norm of a stack, accurate to rounding even where its components cancel."""
    return math.sqrt(compress_stack(left, sigma, right).target.squared_norm)
