"""What a fit needs of the update it approximates: its action on thin factors, never its entries.

A target is a block matrix `M` of small cores, `M_ij [k, l]`. `StackTarget` keeps it as a stack of components,
`M_ij = left_i diag(sigma_ij) right_jᵀ`, which is cheap for tens of clients; `CoreTarget` keeps the cores themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Below this ratio of the sum's energy to that of its components, rounding of Gram matrices would show.
_CANCELLATION = 1e-4


class Target(Protocol):
    """A block matrix `M` with blocks `M_ij [k, l]`, `b` of them a side."""

    def apply(self, right: Tensor, sigma: Tensor) -> Tensor:
        """`Σ_j M_ij right_j diag(sigma_ij)`: `[b, l, r]`, `[b, b, r]` -> `[b, k, r]`."""
        ...

    def diagonal(self, left: Tensor, right: Tensor) -> Tensor:
        """`diag(left_iᵀ M_ij right_j)`: `[b, k, r]`, `[b, l, r]` -> `[b, b, r]`."""
        ...

    def row(self, i: int) -> Tensor:
        """Block row i, `[b, k, l]`."""
        ...

    def restricted(self, rows: Tensor, columns: Tensor) -> CoreTarget:
        """`rows_iᵀ M_ij columns_j` for orthonormal `rows [b, k, s]` and `columns [b, l, t]`."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks a side, `b`."""
        ...

    @property
    def T(self) -> Target:  # noqa: N802 - the transpose's usual name
        """The transposed block matrix."""
        ...

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm."""
        ...


@dataclass(frozen=True)
class StackTarget:
    """`M_ij = left_i diag(sigma_ij) right_jᵀ` with `left [b, k, R]`, `sigma [b, b, R]`, `right [b, l, R]`."""

    left: Tensor
    sigma: Tensor
    right: Tensor
    squared_norm: float

    @classmethod
    def of(cls, left: Tensor, sigma: Tensor, right: Tensor) -> StackTarget:
        """Build from the factors, with the norm: from Gram matrices, or block by block where components cancel."""
        target = cls(left, sigma, right, 0.0)
        gram_left, gram_right = left.mT @ left, right.mT @ right
        b, largest = left.shape[0], 0.0
        squared_norm = 0.0
        for i in range(b):
            mixed = (sigma[i].unsqueeze(2) * gram_right * sigma[i].unsqueeze(1)).sum(0)
            squared_norm += float((gram_left[i] * mixed).sum())
            largest += float((gram_left[i].diagonal() * mixed.diagonal()).sum())
        if not squared_norm > _CANCELLATION * largest:
            squared_norm = sum(float(target.row(i).square().sum()) for i in range(b))
        return cls(left, sigma, right, squared_norm)

    def apply(self, right: Tensor, sigma: Tensor) -> Tensor:
        """See `Target.apply`."""
        projected = self.right.mT @ right
        mixed = torch.einsum("ijc,jck,ijk->ick", self.sigma, projected, sigma)
        return self.left @ mixed

    def diagonal(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Target.diagonal`."""
        return torch.einsum("ick,ijc,jck->ijk", self.left.mT @ left, self.sigma, self.right.mT @ right)

    def row(self, i: int) -> Tensor:
        """See `Target.row`."""
        return (self.left[i] * self.sigma[i].unsqueeze(1)) @ self.right.mT

    def restricted(self, rows: Tensor, columns: Tensor) -> CoreTarget:
        """See `Target.restricted`."""
        left, right = rows.mT @ self.left, columns.mT @ self.right
        return CoreTarget.of((left.unsqueeze(1) * self.sigma.unsqueeze(2)) @ right.mT.unsqueeze(0))

    @property
    def num_blocks(self) -> int:
        """See `Target.num_blocks`."""
        return self.sigma.shape[0]

    @property
    def T(self) -> StackTarget:  # noqa: N802
        """See `Target.T`."""
        return StackTarget(self.right, self.sigma.transpose(0, 1), self.left, self.squared_norm)


@dataclass(frozen=True)
class CoreTarget:
    """`M_ij = cores_ij` with `cores [b, b, k, l]`."""

    cores: Tensor
    squared_norm: float

    @classmethod
    def of(cls, cores: Tensor) -> CoreTarget:
        """Build from the cores, with their norm."""
        return cls(cores, float(cores.square().sum()))

    def apply(self, right: Tensor, sigma: Tensor) -> Tensor:
        """See `Target.apply`."""
        return torch.einsum("ijuk,ijk->iuk", self.cores @ right, sigma)

    def diagonal(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Target.diagonal`."""
        return torch.einsum("iuk,ijuk->ijk", left, self.cores @ right)

    def row(self, i: int) -> Tensor:
        """See `Target.row`."""
        return self.cores[i]

    def restricted(self, rows: Tensor, columns: Tensor) -> CoreTarget:
        """See `Target.restricted`."""
        return CoreTarget.of(rows.mT.unsqueeze(1) @ self.cores @ columns.unsqueeze(0))

    @property
    def num_blocks(self) -> int:
        """See `Target.num_blocks`."""
        return self.cores.shape[0]

    @property
    def T(self) -> CoreTarget:  # noqa: N802
        """See `Target.T`."""
        return CoreTarget(self.cores.permute(1, 0, 3, 2), self.squared_norm)
