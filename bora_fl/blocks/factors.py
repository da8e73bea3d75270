"""One adapter's weight update in block-diversified low-rank form.

With `b` row and column blocks, a rank `r` and a scaling `s`, block `(i, j)` of the update of an `[m, n]` weight is

    delta_W[i, j] = s · B_i diag(Sigma[i, j]) A_j

with `B_i` rows `i·m/b … (i+1)·m/b` of `B [m, r]` and `A_j` columns `j·n/b … (j+1)·n/b` of `A [r, n]` (BoRA:
block-diversified low-rank adaptation). Plain LoRA is `b = 1` with `Sigma = 1`. `Sigma` here is always the effective
one, the value that multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bora_fl.blocks.cores import stack_norm


@dataclass(frozen=True)
class BlockFactors:
    """Block factors of one weight update.

    Args:
        B: `[m, r]`, row block i holds the left factors of block row i.
        sigma: `[b, b, r]`, the effective Sigma.
        A: `[r, n]`, column block j holds the right factors of block column j.
        scaling: Scalar that multiplies the whole update (`alpha / r` or `alpha / sqrt(r)`).

    Raises:
        ValueError: If the shapes do not fit together, or `b` does not divide `m` and `n`.
    """

    B: Tensor
    sigma: Tensor
    A: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.sigma.ndim != 3:
            raise ValueError(
                f"B, sigma and A have shapes {tuple(self.B.shape)}, {tuple(self.sigma.shape)} and"
                f" {tuple(self.A.shape)}; give B [m, r], sigma [b, b, r] and A [r, n]"
            )
        rank, blocks = self.rank, self.num_blocks
        if self.B.shape[1] != rank or self.sigma.shape != (blocks, blocks, rank):
            raise ValueError(
                f"B {tuple(self.B.shape)}, sigma {tuple(self.sigma.shape)} and A {tuple(self.A.shape)} disagree about"
                " the rank or the blocks; give B [m, r], sigma [b, b, r] and A [r, n] with one b and one r"
            )
        if blocks == 0 or self.B.shape[0] % blocks or self.A.shape[1] % blocks:
            raise ValueError(
                f"sigma has {blocks} blocks a side, which does not divide m={self.B.shape[0]} and"
                f" n={self.A.shape[1]}; choose a number of blocks that divides both"
            )

    @property
    def rank(self) -> int:
        """Number of components `r` (the update's matrix rank is up to `b·r`)."""
        return self.A.shape[0]

    @property
    def num_blocks(self) -> int:
        """Number of row blocks and of column blocks `b`."""
        return self.sigma.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m, n)` of the weight that is updated."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """The update itself, `[m, n]`: for tests, export and small layers; nothing in this package calls it."""
        left, sigma, right = blocked(self, self.B.dtype)
        update = torch.einsum("ipk,ijk,jqk->ipjq", left, sigma, right)
        return update.reshape(self.shape)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        """The same update as plain LoRA of rank `b·r`, exactly.

        Row block i of `lora_B` is `scaling · [B_i Sigma_i1 … B_i Sigma_ib]` and `lora_A = blockdiag(A_1, …, A_b)`.

        Returns:
            `(lora_B [m, b·r], lora_A [b·r, n])` with `delta_W = lora_B @ lora_A`.
        """
        b, r = self.num_blocks, self.rank
        left, sigma, right = blocked(self, self.B.dtype)
        lora_b = (left.unsqueeze(2) * sigma.unsqueeze(1)).reshape(self.shape[0], b * r)
        q = right.shape[1]
        lora_a = right.new_zeros(b * r, b * q)
        for j in range(b):
            lora_a[j * r : (j + 1) * r, j * q : (j + 1) * q] = right[j].mT
        return lora_b, lora_a

    def component_energy(self) -> Tensor:
        """Squared Frobenius norm of each component alone, `[r]` in float64."""
        left, sigma, right = blocked(self)
        return torch.einsum("ik,ijk,jk->k", left.square().sum(1), sigma.square(), right.square().sum(1))

    def norm(self) -> float:
        """Frobenius norm of the update, in float64 and without forming it."""
        return stack_norm(*blocked(self))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> BlockFactors:
        """The same factors with another dtype or on another device."""
        B, sigma, A = (t.to(device=device, dtype=dtype) for t in (self.B, self.sigma, self.A))
        return BlockFactors(B, sigma, A, self.scaling)


def blocked(factors: BlockFactors, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Factors as batches over blocks, with the scaling inside Sigma.

    Returns:
        `left [b, m/b, r]`, `sigma [b, b, r]`, `right [b, n/b, r]` with block `(i, j)` of the update equal to
        `left_i diag(sigma_ij) right_jᵀ`.
    """
    b, r = factors.num_blocks, factors.rank
    m, n = factors.shape
    left = factors.B.to(dtype).reshape(b, m // b, r)
    right = factors.A.to(dtype).reshape(r, b, n // b).permute(1, 2, 0)
    return left, factors.sigma.to(dtype) * factors.scaling, right


def rescaled(factors: BlockFactors, rows: Tensor, columns: Tensor) -> BlockFactors:
    """The same update as `B_i[:, k] · rows_ik`, `Sigma[i, j, k] / (rows_ik columns_jk)`, `A_j[k, :] · columns_jk`.

    Args:
        factors: Any factors.
        rows: `[b, r]`, without zeros.
        columns: `[b, r]`, without zeros.
    """
    b, r = factors.num_blocks, factors.rank
    B = factors.B.double().reshape(b, -1, r) * rows[:, None]
    A = factors.A.double().reshape(r, b, -1) * columns.T[:, :, None]
    return BlockFactors(
        B.reshape(-1, r).to(factors.B.dtype),
        (factors.sigma.double() / rows[:, None] / columns).to(factors.sigma.dtype),
        A.reshape(r, -1).to(factors.A.dtype),
        factors.scaling,
    )


def unblocked(left: Tensor, sigma: Tensor, right: Tensor, scaling: float, dtype: torch.dtype) -> BlockFactors:
    """The inverse of `blocked`: factors of the given scaling and dtype."""
    b, q, r = right.shape
    return BlockFactors(
        left.reshape(-1, r).to(dtype).contiguous(),
        (sigma / scaling).to(dtype).contiguous(),
        right.permute(2, 0, 1).reshape(r, b * q).to(dtype).contiguous(),
        scaling,
    )
