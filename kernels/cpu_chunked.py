"""The CPU path's branch in chunks of tokens that fit the second-level cache.

x, y and dY are read from memory once, and every small product of a chunk finds them in the cache. Inside a chunk of C
tokens u, z, dz and du are `[b, r, C]` or `[r, b, C]`: the mixing is then a batched product over the rank, and the sums
over tokens run along contiguous rows. Formulas are those of `reference.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bora_fl.kernels.reference import Needs, apply_dropout

CHUNK_BYTES = 768 * 1024  # a chunk of x and one of dY share a 2 MiB second-level cache with the small products


def add_branch(
    y: Tensor, x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float, keep: Tensor | None, dropout_p: float
) -> None:
    """Add the branch to `y [T, m]`; products are taken in the wider of x's and A's dtypes."""
    layer = _Chunks(x, A, Sigma, B, scaling, keep, dropout_p)
    B_t = layer.B.transpose(1, 2).contiguous()  # [b, r, q]
    for rows in layer.rows():
        z = layer.mix(layer.project(layer.blocks_of_x(rows), layer.A_t))
        _add_blocks(y[rows], torch.bmm(z.permute(1, 2, 0), B_t))


def add_gradients(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Add the branch's gradient to `dx [T, n]` where one is given; return those of A, Sigma and B."""
    layer = _Chunks(x, A, Sigma, B, scaling, keep, dropout_p)
    b, r, p, q = layer.b, layer.r, layer.p, layer.q
    wide = torch.promote_types(layer.work, torch.float32)  # partial sums of half-precision chunks are kept in float32
    dA, dB = torch.zeros(b, r, p, dtype=wide), torch.zeros(b, r, q, dtype=wide)
    dSigma = torch.zeros(r, b, b, dtype=wide)
    for rows in layer.rows():
        dy_blocks = layer.blocks(dy[rows].to(layer.work), q)
        x_blocks = layer.blocks_of_x(rows)
        dz = layer.project(dy_blocks, layer.B)
        if needs.B or needs.Sigma:
            u = layer.project(x_blocks, layer.A_t)
            if needs.B:
                dB += torch.bmm(layer.mix(u).transpose(0, 1), dy_blocks)
            if needs.Sigma:
                dSigma += torch.bmm(dz.transpose(0, 1), u.permute(1, 2, 0))
        if needs.A or dx is not None:
            du = layer.mix_back(dz)
            if needs.A:
                dA += torch.bmm(du.transpose(0, 1), x_blocks)
            if dx is not None:
                _add_blocks(dx[rows], layer.undrop(torch.bmm(du.permute(1, 2, 0), layer.A), rows))
    return (
        dA.transpose(0, 1).reshape(r, b * p).to(A.dtype) if needs.A else None,
        (dSigma.permute(1, 2, 0) * scaling).to(Sigma.dtype).contiguous() if needs.Sigma else None,
        dB.transpose(1, 2).reshape(b * q, r).to(B.dtype) if needs.B else None,
    )


class _Chunks:
    """The factors in the layouts the products want, and one chunk's worth of each product."""

    def __init__(
        self, x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float, keep: Tensor | None, dropout_p: float
    ):
        self.x, self.keep, self.dropout_p = x, keep, dropout_p
        self.work = torch.promote_types(x.dtype, A.dtype)
        self.b, self.r = Sigma.shape[0], A.shape[0]
        self.p, self.q = A.shape[1] // self.b, B.shape[0] // self.b
        self.A = A.to(self.work).view(self.r, self.b, self.p).transpose(0, 1).contiguous()  # [b, r, p]
        self.A_t = self.A.transpose(1, 2).contiguous()  # [b, p, r]
        self.B = B.to(self.work).reshape(self.b, self.q, self.r)  # [b, q, r]
        by_rank = (Sigma * scaling).to(self.work).permute(2, 0, 1)
        self.Sigma = by_rank.contiguous()  # [r, i, j]
        self.Sigma_t = by_rank.transpose(1, 2).contiguous()  # [r, j, i]

    def rows(self) -> Iterator[slice]:
        """Yield the chunks of tokens."""
        width = max(self.p, self.q) * self.b * torch.empty((), dtype=self.work).element_size()
        step = max(64, CHUNK_BYTES // width)
        return (slice(start, start + step) for start in range(0, self.x.shape[0], step))

    def blocks(self, rows: Tensor, width: int) -> Tensor:
        """View `[C, b·width]` as `[b, C, width]`."""
        return rows.view(-1, self.b, width).transpose(0, 1)

    def blocks_of_x(self, rows: slice) -> Tensor:
        """Return the chunk of x after dropout, `[b, C, p]`."""
        keep = None if self.keep is None else self.keep[rows]
        return self.blocks(apply_dropout(self.x[rows].to(self.work), keep, self.dropout_p), self.p)

    def project(self, blocks: Tensor, factor: Tensor) -> Tensor:
        """Multiply `[b, C, width]` by `[b, width, r]`; the result is laid out `[b, r, C]`."""
        return torch.bmm(blocks, factor).transpose(1, 2).contiguous()

    def mix(self, u: Tensor) -> Tensor:
        """Return `z_i = scaling · Σ_j Sigma[i,j] ∘ u_j` as `[r, b, C]`, from `[b, r, C]`."""
        return torch.bmm(self.Sigma, u.transpose(0, 1))

    def mix_back(self, dz: Tensor) -> Tensor:
        """Return `du_j = scaling · Σ_i Sigma[i,j] ∘ dz_i` as `[r, b, C]`, from `[b, r, C]`."""
        return torch.bmm(self.Sigma_t, dz.transpose(0, 1))

    def undrop(self, blocks: Tensor, rows: slice) -> Tensor:
        """Carry a gradient `[b, C, p]` with respect to x̂ back to x."""
        if self.keep is None:
            return blocks
        return apply_dropout(blocks, self.blocks(self.keep[rows], self.p), self.dropout_p)


def _add_blocks(rows: Tensor, blocks: Tensor) -> None:
    """Add `[b, C, width]` to the rows `[C, b·width]`."""
    b, _, width = blocks.shape
    rows.view(-1, b, width).add_(blocks.transpose(0, 1))
