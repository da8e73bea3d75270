"""The truncated SVD of a whole update, from its action on thin factors."""

from __future__ import annotations

import torch
from torch import Tensor

from bora_fl.blocks.least_squares import Fit
from bora_fl.blocks.targets import Target

_EXACT_SIDE = 512  # up to this many rows and columns the matrix of cores is small enough to be decomposed as it is
_OVERSAMPLING = 12
_ITERATIONS = 8


def leading_svd(target: Target, rank: int) -> Fit:
    """The best approximation of (ordinary) rank `rank` to the whole block matrix, as block factors.

    Its Sigma is the same in every block: the singular values. Exact for one block and for small targets; for larger
    ones a randomized subspace iteration under a fixed seed, exact but for what lies between neighbouring singular
    values.

    Args:
        target: Block matrix with cores `[k, l]`.
        rank: At most the smaller side; further components are zero.

    Returns:
        `left [b, k, rank]`, `sigma [b, b, rank]`, `right [b, l, rank]`; left and right are orthonormal over all blocks
        together.
    """
    b = target.num_blocks
    row = target.row(0)
    height, width = b * row.shape[1], b * row.shape[2]
    if b == 1 or max(height, width) <= _EXACT_SIDE:
        u, s, vh = torch.linalg.svd(_whole(target), full_matrices=False)
    else:
        u, s, vh = _iterated(target, min(rank + _OVERSAMPLING, height, width), height, width, row)
    kept = min(rank, s.shape[0])
    left, right = row.new_zeros(height, rank), row.new_zeros(width, rank)
    sigma = row.new_zeros(rank)
    left[:, :kept], sigma[:kept], right[:, :kept] = u[:, :kept], s[:kept], vh[:kept].mT
    return Fit(left.reshape(b, -1, rank), sigma.expand(b, b, rank).contiguous(), right.reshape(b, -1, rank))


def singular_values(target: Target) -> Tensor:
    """All singular values of the whole block matrix, the largest first."""
    values: Tensor = torch.linalg.svdvals(_whole(target))
    return values


def _whole(target: Target) -> Tensor:
    rows = [target.row(i).permute(1, 0, 2) for i in range(target.num_blocks)]
    return torch.cat([row.reshape(row.shape[0], -1) for row in rows])


def _iterated(target: Target, width: int, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = target.num_blocks
    ones = like.new_ones(b, b, width)
    probe = torch.randn(columns, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    basis = torch.linalg.qr(target.apply(probe.reshape(b, -1, width), ones).reshape(rows, width)).Q
    for _ in range(_ITERATIONS):
        image = target.T.apply(basis.reshape(b, -1, width), ones).reshape(columns, width)
        image = target.apply(torch.linalg.qr(image).Q.reshape(b, -1, width), ones)
        basis = torch.linalg.qr(image.reshape(rows, width)).Q
    small = target.T.apply(basis.reshape(b, -1, width), ones).reshape(columns, width).mT
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    return basis @ u, s, vh
