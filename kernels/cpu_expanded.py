"""The CPU path's branch as one LoRA of rank b·r: few, dense products.

With `A_big = blockdiag(A_j) [b·r, n]` and `B_big[i,j] = scaling · B_i diag(Sigma[i,j]) [m, b·r]` the branch is
`x A_bigᵀ B_bigᵀ`. Most of A_big is zeros, so it does b times the flops of `cpu_chunked.py`, in a tenth of its calls:
the better bargain where matrix units make flops nearly free (bfloat16) and where a layer is so small that calls are
what costs. The gradients of B and Sigma both come from one product, `G = dYᵀ u [m, b·r]`:

    dB_i = scaling · Σ_j G[i,j] diag(Sigma[i,j])        dSigma[i,j,k] = scaling · Σ_q B_i[q,k] G[i,j][q,k]
"""

import torch
from torch import Tensor

from bora_fl.kernels.reference import Needs, apply_dropout


def _expand(A: Tensor, Sigma: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return `A_big [b·r, n]` and `B_big [m, b·r]` from `A [r, n]`, `Sigma [b, b, r]`, `B [m, r]`."""
    (r, n), b, m = A.shape, Sigma.shape[0], B.shape[0]
    A_big = A.new_zeros(b, r, b, n // b)
    A_big.diagonal(dim1=0, dim2=2).copy_(A.view(r, b, n // b).permute(0, 2, 1))
    B_big = B.reshape(b, m // b, 1, r) * (Sigma * scaling).to(B.dtype).unsqueeze(1)
    return A_big.view(b * r, n), B_big.view(m, b * r)


def add_branch(
    y: Tensor, x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float, keep: Tensor | None, dropout_p: float
) -> None:
    """Add the branch to `y [T, m]`; all tensors of one dtype but Sigma."""
    A_big, B_big = _expand(A, Sigma, B, scaling)
    y.addmm_(apply_dropout(x, keep, dropout_p) @ A_big.t(), B_big.t())


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
    (r, n), b, m = A.shape, Sigma.shape[0], B.shape[0]
    A_big, B_big = _expand(A, Sigma, B, scaling)
    dropped = apply_dropout(x, keep, dropout_p)
    dA = dSigma = dB = None
    if needs.Sigma or needs.B:
        G = (dy.t() @ (dropped @ A_big.t())).view(b, m // b, b, r)  # [i, q, j, k]
        if needs.B:
            dB = torch.einsum("iqjk,ijk->iqk", G, (Sigma * scaling).to(G.dtype)).reshape(m, r)
        if needs.Sigma:
            dSigma = (torch.einsum("iqjk,iqk->ijk", G, B.reshape(b, m // b, r)) * scaling).to(Sigma.dtype)
    if needs.A or dx is not None:
        du = dy @ B_big
        if needs.A:
            blocks = (du.t() @ dropped).view(b, r, b, n // b)
            dA = blocks.diagonal(dim1=0, dim2=2).permute(0, 2, 1).reshape(r, n)
        if dx is not None and keep is None:
            dx.addmm_(du, A_big)
        elif dx is not None:
            dx += apply_dropout(du @ A_big, keep, dropout_p)
    return dA, dSigma, dB
