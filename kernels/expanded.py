"""The branch in few, dense products, on any device: the GPU path `expanded`, and small layers on a CPU.

With `B_big[i,j] = scaling · B_i diag(Sigma[i,j])`, `[m, b·r]`, the branch is `y = u B_bigᵀ`, where u, `[T, b·r]`, holds
the blocks `u_j = x̂_j A_jᵀ` side by side, from one batched product. The products with B_big do b times the flops of
the block formulas, in a third of the calls: the better bargain where matrix units make flops nearly free, and where a
layer is so small that calls are what costs. The gradients of B and Sigma both come from one product,
`G = dYᵀ u [m, b·r]`:

    dB_i = scaling · Σ_j G[i,j] diag(Sigma[i,j])        dSigma[i,j,k] = scaling · Σ_q B_i[q,k] G[i,j][q,k]
"""

import torch
from torch import Tensor

from bora_fl.kernels.reference import Gradients, Needs, apply_dropout, unit_rows


def _blocks(x: Tensor, b: int) -> Tensor:
    """View `x [T, b·p]` as `[b, T, p]`."""
    return x.view(x.shape[0], b, x.shape[1] // b).transpose(0, 1)


def _scaled(Sigma: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return `scaling · Sigma` in B's dtype, `[b, 1, b, r]`, to be multiplied with `[b, q, …, r]`."""
    return (Sigma * scaling).to(B.dtype).unsqueeze(1)


def _expand(scaled: Tensor, B: Tensor) -> Tensor:
    """Return `B_big [m, b·r]` from `scaled [b, 1, b, r]` and `B [m, r]`."""
    b, r, m = scaled.shape[0], scaled.shape[3], B.shape[0]
    return (B.view(b, m // b, 1, r) * scaled).view(m, b * r)


def project(x: Tensor, A: Tensor, b: int) -> Tensor:
    """Return `u [T, b, r]` of `x [T, n]` and `A [r, n]`, both of one dtype."""
    r, n = A.shape
    u = x.new_empty(x.shape[0], b, r)
    torch.bmm(_blocks(x, b), A.view(r, b, n // b).permute(1, 2, 0), out=u.transpose(0, 1))
    return u


def add_branch(y: Tensor, u: Tensor, Sigma: Tensor, B: Tensor, scaling: float) -> None:
    """Add the branch to `y [T, m]`, from `u [T, b, r]`; all of one dtype but Sigma."""
    y.addmm_(u.flatten(1), _expand(_scaled(Sigma, B, scaling), B).t())


def add_gradients(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    u: Tensor | None,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Add the branch's gradient to `dx [T, n]` where one is given; return those of A, Sigma and B.

    Args:
        x: `[T, n]`, after dropout; `u`: `[T, b, r]`, of it; None where neither Sigma's nor B's gradient is wanted.
        keep: `[T, n]`, bool, the dropout mask; None without dropout.
    """
    (r, n), b, m = A.shape, Sigma.shape[0], B.shape[0]
    dA = dSigma = dB = None
    scaled = _scaled(Sigma, B, scaling) if needs.B or needs.A or dx is not None else None
    if u is not None and (needs.Sigma or needs.B):
        G = (dy.t() @ u.flatten(1)).view(b, m // b, b, r)  # [i, q, j, k]
        if needs.B and scaled is not None:
            dB = (G * scaled).sum(2).view(m, r)
        if needs.Sigma:
            # the terms of a sum over m elements are not rounded to half precision before they are added
            wide = B.to(torch.promote_types(B.dtype, torch.float32)) * scaling
            dSigma = (G * wide.view(b, m // b, 1, r)).sum(1).to(Sigma.dtype)
    if scaled is not None and (needs.A or dx is not None):
        du = (dy @ _expand(scaled, B)).view(-1, b, r).transpose(0, 1)  # [b, T, r]
        if needs.A:
            dA = torch.empty_like(A)
            torch.bmm(du.transpose(1, 2), _blocks(x, b), out=dA.view(r, b, n // b).transpose(0, 1))
        if dx is not None:
            A_blocks = A.view(r, b, n // b).transpose(0, 1)  # [b, r, p]
            if keep is None:
                _blocks(dx, b).baddbmm_(du, A_blocks)
            else:
                _blocks(dx, b).add_(apply_dropout(du @ A_blocks, _blocks(keep, b), dropout_p))
    return dA, dSigma, dB


def forward(
    x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `y [T, m]` and `u [T, b, r]`, which `backward` wants back; arguments as in `triton_launch.forward`."""
    x, A, B = unit_rows(x), A.contiguous(), B.contiguous()
    u = project(x, A, Sigma.shape[0])
    if weight is None:
        return u.flatten(1) @ _expand(_scaled(Sigma, B, scaling), B).t(), u
    y = torch.nn.functional.linear(x, weight, bias)
    add_branch(y, u, Sigma, B, scaling)
    return y, u


def traceable(
    x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return `forward`'s y by operations that a compiler can see into, differentiate and fuse."""
    b, (r, n) = Sigma.shape[0], A.shape
    u = torch.bmm(_blocks(unit_rows(x), b), A.view(r, b, n // b).permute(1, 2, 0)).transpose(0, 1)
    y = u.flatten(1) @ _expand(_scaled(Sigma, B, scaling), B).t()
    return y if weight is None else torch.nn.functional.linear(x, weight, bias) + y


def backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    weight: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Return the gradients of `forward` in the dtypes of their tensors; None where `needs` is False."""
    x, A, B = unit_rows(x), A.contiguous(), B.contiguous()
    dx = None
    if needs.x:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if weight is None else dy @ weight
    return Gradients(dx, *add_gradients(dx, dy, x, u, A, Sigma, B, scaling, None, 0.0, needs))
