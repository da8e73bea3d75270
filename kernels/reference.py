"""The maths of a BoRA layer in plain torch: the definition that every fused path is compared with.

Shapes: T tokens, n in_features, m out_features, b blocks, r rank, p = n/b and q = m/b the block widths.

    forward     u_j = x̂_j A_jᵀ                       [T, r]     x̂ = x, or x after dropout
                z_i = Σ_j Sigma[i,j] ∘ u_j           [T, r]
                y_i = scaling · z_i B_iᵀ             [T, q]

    backward    dz_i = scaling · dY_i B_i            [T, r]
                dB_i = scaling · dY_iᵀ z_i           [q, r]
                dSigma[i,j] = Σ_t dz_i ∘ u_j         [r]
                du_j = Σ_i Sigma[i,j] ∘ dz_i         [T, r]
                dA_j = du_jᵀ x̂_j                     [r, p]
                dx̂_j = du_j A_j                      [T, p]     dx = dx̂ through the dropout mask

BoRA writes the update as `delta_W[i,j] = scaling · B_i diag(Sigma[i,j]) A_j` and `Sigma = exp(sigma / mean|sigma|)`;
`b = 1` with `Sigma = 1` is LoRA. Everything here works in any float dtype; float64 is the oracle of the tests.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bora_fl.kernels.dropout import keep_mask, keep_scale


class Gradients(NamedTuple):
    """Gradients of a branch; None where none was asked for."""

    x: Tensor | None  # [T, n]
    A: Tensor | None  # [r, n]
    Sigma: Tensor | None  # [b, b, r]
    B: Tensor | None  # [m, r]


class Needs(NamedTuple):
    """Which gradients are wanted, in the order of `Gradients`."""

    x: bool = True
    A: bool = True
    Sigma: bool = True
    B: bool = True


def _exp_norm_forward(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return Sigma and `1 / mean|sigma|`, `[..., 1, 1, 1]`."""
    mean = sigma.abs().mean((-3, -2, -1), keepdim=True, dtype=torch.promote_types(sigma.dtype, torch.float32))
    # All-zero sigma has no scale: Sigma is then 1 and the gradient 0 instead of NaN.
    inverse = torch.where(mean > 0, mean.reciprocal(), torch.zeros_like(mean))
    return torch.exp(sigma * inverse).to(sigma.dtype), inverse


class _ExpNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sigma: Tensor) -> Tensor:
        Sigma, inverse = _exp_norm_forward(sigma)
        ctx.save_for_backward(sigma, Sigma, inverse)
        return Sigma

    @staticmethod
    def backward(ctx: Any, dSigma: Tensor) -> Tensor:
        sigma, Sigma, inverse = ctx.saved_tensors
        g = dSigma * Sigma * inverse
        dsigma: Tensor = g - sigma.sign() * (g * sigma * inverse).mean((-3, -2, -1), keepdim=True)
        return dsigma.to(sigma.dtype)


def exp_norm(sigma: Tensor) -> Tensor:
    """Return `Sigma = exp(sigma / mean|sigma|)`, the mean over the whole tensor (BoRA's map), for one layer or several.

    Sigma does not change when sigma is scaled by a positive number, so the gradient is orthogonal to sigma. With
    `z = sigma/M`, `M = mean|sigma|`, `g = dL/dSigma ∘ Sigma` over N elements:
    `dL/dsigma = g/M - sign(sigma)·<g, z>/(N·M)`.

    Args:
        sigma: `[b, b, r]`, or `[L, b, b, r]` for L layers, each with a mean of its own; any float dtype.

    Returns:
        Sigma, of sigma's shape and dtype, all positive.
    """
    if in_functorch():
        return _exp_norm_forward(sigma)[0]
    Sigma: Tensor = _ExpNorm.apply(sigma)  # type: ignore[no-untyped-call]
    return Sigma


def in_functorch() -> bool:
    """Whether a torch.func transform (vmap, grad) is tracing: then only plain torch operations may run."""
    return bool(torch._C._are_functorch_transforms_active())


def apply_dropout(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """Return x̂: x where `keep` holds, scaled to keep its mean, zero elsewhere; x itself without a mask."""
    return x if keep is None else x * keep * keep_scale(dropout_p)


def unit_rows(x: Tensor) -> Tensor:
    """Return `x [T, n]` with unit stride along its rows."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def branch_forward(x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the branch's output and what its backward reuses.

    Args:
        x: `[T, n]`, after dropout.
        A: `[r, n]`.
        Sigma: `[b, b, r]`, effective.
        B: `[m, r]`.
        scaling: factor of the whole update.

    Returns:
        `y [T, m]` and `u [T, b, r]`.
    """
    b, r = Sigma.shape[0], A.shape[0]
    u = torch.einsum("tjp,rjp->tjr", x.view(-1, b, A.shape[1] // b), A.view(r, b, -1))
    z = torch.einsum("ijr,tjr->tir", Sigma, u)
    y = torch.einsum("tir,iqr->tiq", z, B.view(b, -1, r)) * scaling
    return y.reshape(-1, B.shape[0]), u


def branch_backward(
    dy: Tensor, x: Tensor, u: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float, needs: Needs | None = None
) -> Gradients:
    """Return the gradients of `branch_forward`, by the formulas at the top of this module.

    Args:
        dy: `[T, m]`, gradient of y.
        x: `[T, n]`, after dropout; the gradient returned is with respect to it.
        u: `[T, b, r]`, from the forward pass.
        A: `[r, n]`.
        Sigma: `[b, b, r]`.
        B: `[m, r]`.
        scaling: factor of the whole update.
        needs: which gradients to compute; all by default.
    """
    needs = needs or Needs()
    b, r = Sigma.shape[0], A.shape[0]
    dy_blocks, x_blocks = dy.reshape(-1, b, B.shape[0] // b), x.view(-1, b, A.shape[1] // b)
    dB = dSigma = dA = dx = None
    if needs.B:
        z = torch.einsum("ijr,tjr->tir", Sigma, u)
        dB = (torch.einsum("tiq,tir->iqr", dy_blocks, z) * scaling).reshape(B.shape)
    if needs.x or needs.A or needs.Sigma:
        dz = torch.einsum("tiq,iqr->tir", dy_blocks, B.view(b, -1, r)) * scaling
        if needs.Sigma:
            dSigma = torch.einsum("tir,tjr->ijr", dz, u)
        du = torch.einsum("ijr,tir->tjr", Sigma, dz)
        if needs.A:
            dA = torch.einsum("tjr,tjp->rjp", du, x_blocks).reshape(A.shape)
        if needs.x:
            dx = torch.einsum("tjr,rjp->tjp", du, A.view(r, b, -1)).reshape(x.shape)
    return Gradients(dx, dA, dSigma, dB)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, Sigma: Tensor, B: Tensor, scaling: float, dropout_p: float, seed: Tensor | None
    ) -> Tensor:
        work = torch.promote_types(x.dtype, A.dtype)
        keep = None if seed is None else keep_mask(x.shape[0], x.shape[1], dropout_p, seed)
        factors = A.to(work), Sigma.to(work), B.to(work)
        y, u = branch_forward(apply_dropout(x.to(work), keep, dropout_p), *factors, scaling)
        ctx.save_for_backward(x, u, A, Sigma, B, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, A, Sigma, B, seed = ctx.saved_tensors
        work = u.dtype
        keep = None if seed is None else keep_mask(x.shape[0], x.shape[1], ctx.dropout_p, seed)
        grads = branch_backward(
            dy.to(work),
            apply_dropout(x.to(work), keep, ctx.dropout_p),
            u,
            A.to(work),
            Sigma.to(work),
            B.to(work),
            ctx.scaling,
            Needs(*ctx.needs_input_grad[:4]),
        )
        dx = None if grads.x is None else apply_dropout(grads.x, keep, ctx.dropout_p).to(x.dtype)
        factors = zip(grads[1:], (A, Sigma, B), strict=True)
        return dx, *(None if grad is None else grad.to(factor.dtype) for grad, factor in factors), None, None, None


def bora_branch_reference(
    x: Tensor,
    A: Tensor,
    Sigma: Tensor,
    B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return the BoRA branch of a linear layer, differentiable in x, A, Sigma and B.

    Args:
        x: `[..., n]`.
        A: `[r, n]`.
        Sigma: `[b, b, r]`, effective (after its transform); b divides n and m.
        B: `[m, r]`.
        scaling: factor of the whole update.
        dropout_p: probability of dropping an element of x before A; 0 turns dropout off.
        seed: `[]`, int64; needed when `dropout_p` is above 0.

    Returns:
        y `[..., m]`, in x's dtype; products are taken in the wider of x's and A's dtypes.

    Raises:
        ValueError: if `dropout_p` is above 0 and no seed is given.
    """
    if dropout_p > 0 and seed is None:
        raise ValueError(f"dropout_p={dropout_p} needs a seed: pass an int64 tensor, for example dropout.draw_seed()")
    rows = x.reshape(-1, x.shape[-1])
    if in_functorch() and dropout_p == 0:
        y = branch_forward(rows, A, Sigma, B, scaling)[0]
    else:
        y = _Branch.apply(rows, A, Sigma, B, scaling, dropout_p, seed if dropout_p > 0 else None)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], B.shape[0])
