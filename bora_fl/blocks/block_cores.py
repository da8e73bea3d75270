"""Updates kept as cores between orthonormal bases, the form a long sum of clients is held in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_fl.blocks.cores import Compressed, ExplicitBasis, compress_stack
from bora_fl.blocks.factors import BlockFactors, blocked
from bora_fl.blocks.targets import CoreTarget, StackTarget


@dataclass(frozen=True)
class BlockCores:
    """Blocks `rows_i cores_ij columns_jᵀ` with orthonormal `rows_i` and `columns_j`.

    Args:
        rows: `[b, m/b, k]`.
        cores: `[b, b, k, l]`.
        columns: `[b, n/b, l]`.
        discarded: Upper bound of the Frobenius norm of what was dropped to keep the form small.
    """

    rows: Tensor
    cores: Tensor
    columns: Tensor
    discarded: float = 0.0

    @property
    def num_blocks(self) -> int:
        """Number of row blocks and of column blocks `b`."""
        return self.cores.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m, n)` of the weight that is updated."""
        return self.rows.shape[0] * self.rows.shape[1], self.columns.shape[0] * self.columns.shape[1]

    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(self.cores.double().norm())

    def dense(self) -> Tensor:
        """The update itself, `[m, n]`: for tests and small layers."""
        blocks = self.rows.unsqueeze(1) @ self.cores @ self.columns.mT.unsqueeze(0)
        return blocks.permute(0, 2, 1, 3).reshape(self.shape)

    def scaled(self, weight: float) -> BlockCores:
        """The update times a number."""
        return BlockCores(self.rows, self.cores * weight, self.columns, self.discarded * abs(weight))


def compressed(update: BlockFactors | BlockCores) -> Compressed:
    """The update in float64, as a target between bases."""
    if isinstance(update, BlockFactors):
        return compress_stack(*blocked(update))
    rows, columns = ExplicitBasis(update.rows.double()), ExplicitBasis(update.columns.double())
    return Compressed(rows, CoreTarget.of(update.cores.double()), columns)


def add_up(updates: Sequence[BlockFactors | BlockCores], capacity: int | None = None) -> BlockCores:
    """The sum of updates of one shape and block count, as cores.

    Args:
        updates: At least one.
        capacity: Most directions kept in every block row and block column, those of most energy; None keeps all.

    Returns:
        The sum in the first update's dtype; `discarded` adds the bounds of the parts and what this call dropped.
    """
    first = updates[0]
    dtype = first.B.dtype if isinstance(first, BlockFactors) else first.rows.dtype
    lefts, rights = zip(*(_vectors(update) for update in updates), strict=True)
    rows, row_parts = _joint_basis(lefts)
    columns, column_parts = _joint_basis(rights)

    def core_row(i: int) -> Tensor:
        """Block row i of the joint cores, `[b, k, l]`."""
        total = rows.new_zeros(columns.shape[0], rows.shape[2], columns.shape[2])
        for update, left, right in zip(updates, row_parts, column_parts, strict=True):
            if isinstance(update, BlockFactors):
                total += StackTarget(left, update.sigma.double() * update.scaling, right, 0.0).row(i)
            else:
                total += left[i] @ update.cores[i].double() @ right.mT
        return total

    b = rows.shape[0]
    discarded = math.fsum(update.discarded for update in updates if isinstance(update, BlockCores))
    if capacity is None or max(rows.shape[2], columns.shape[2]) <= capacity:
        cores = torch.stack([core_row(i) for i in range(b)])
    else:
        row_gram = rows.new_zeros(b, rows.shape[2], rows.shape[2])
        column_gram = rows.new_zeros(b, columns.shape[2], columns.shape[2])
        for i in range(b):
            core = core_row(i)
            row_gram[i] = (core @ core.mT).sum(0)
            column_gram += core.mT @ core
        keep_rows, lost_rows = _leading(row_gram, capacity)
        keep_columns, lost_columns = _leading(column_gram, capacity)
        cores = torch.stack([keep_rows[i].mT @ core_row(i) @ keep_columns for i in range(b)])
        rows, columns = rows @ keep_rows, columns @ keep_columns
        discarded += math.sqrt(lost_rows + lost_columns)
    return BlockCores(rows.to(dtype), cores.to(dtype), columns.to(dtype), discarded)


def _vectors(update: BlockFactors | BlockCores) -> tuple[Tensor, Tensor]:
    if isinstance(update, BlockFactors):
        left, _, right = blocked(update)
        return left, right
    return update.rows.double(), update.columns.double()


def _joint_basis(vectors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Orthonormal basis `[b, p, k]` of all vectors and the coordinates of each set in it."""
    basis, triangle = torch.linalg.qr(torch.cat(list(vectors), dim=2))
    return basis, triangle.split([v.shape[2] for v in vectors], dim=2)


def _leading(gram: Tensor, capacity: int) -> tuple[Tensor, float]:
    """Leading eigenvectors of every block's Gram matrix, and the energy of the others."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors[..., -capacity:], float(values[:, :-capacity].clamp_min(0).sum())
