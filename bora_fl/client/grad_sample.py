"""Per-sample gradients of a BoRA adapter, in closed form, registered with Opacus.

With x̂ the input, dY the gradient of the output and t running over the tokens of one sample s (the formulas of
`bora_fl.kernels.reference`, summed over one sample's tokens instead of over all):

    dB_i[s]        = scaling · Σ_t dY_i[s,t]ᵀ z_i[s,t]           z_i = Σ_j Sigma[i,j] ∘ u_j,  u_j = A_j x̂_j
    dSigma[i,j][s] = Σ_t dz_i[s,t] ∘ u_j[s,t]                    dz_i = scaling · B_iᵀ dY_i
    dA_j[s]        = Σ_t du_j[s,t]ᵀ x̂_j[s,t]                     du_j = Σ_i Sigma[i,j] ∘ dz_i
    dsigma[s]      = g/M − sign(sigma)·<g, z>/(N·M)              g = dSigma[s] ∘ Sigma, z = sigma/M, M = mean|sigma|

The last line is `exp_norm`'s; under `identity` dsigma = dSigma. The cost is that of the batch's gradient, and the
result is `r·(m + n)` numbers a sample where its activations are `tokens·(m + n)`: a second backward pass gains nothing.
"""

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn

from bora_fl.adapters.layer import BoraAdapter


def adapter_sample_gradients(adapter: BoraAdapter, x: Tensor, dy: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """Return the gradients of each sample's loss with respect to an adapter's parameters.

    Args:
        adapter: The adapter, without dropout.
        x: Its input, `[samples, ..., n]`.
        dy: Gradient of the summed loss with respect to its output, `[samples, ..., m]`.
        wanted: Which of `"A"`, `"sigma"` and `"B"` to compute.

    Returns:
        Parameter name to gradient: A `[samples, r, n]`, sigma `[samples, b, b, r]`, B `[samples, m, r]`, in the
        parameters' dtype.

    Raises:
        ValueError: If the adapter drops inputs, since the mask is not known here.
    """
    if adapter.dropout_p > 0 and adapter.training:
        raise ValueError(
            f"bora_dropout={adapter.dropout_p}: per-sample gradients are taken without dropout; set bora_dropout to 0"
        )
    A, B = adapter.A.detach(), adapter.B.detach()
    Sigma = adapter.effective_sigma().detach()
    samples, (b, _, r) = x.shape[0], Sigma.shape
    x = (
        x.detach().to(A.dtype).reshape(samples, -1, b, A.shape[1] // b)
        if x.numel()
        else x.new_zeros(0, 0, b, A.shape[1] // b)
    )
    dy = dy.to(A.dtype).reshape(*x.shape[:2], b, B.shape[0] // b)

    gradients = {}
    if wanted & {"B", "sigma"}:
        u = torch.einsum("stjp,rjp->stjr", x, A.view(r, b, -1))
    if "B" in wanted:
        z = torch.einsum("ijr,stjr->stir", Sigma, u)
        gradients["B"] = torch.einsum("stiq,stir->siqr", dy, z).reshape(samples, *B.shape) * adapter.scaling
    if wanted & {"A", "sigma"}:
        dz = torch.einsum("stiq,iqr->stir", dy, B.view(b, -1, r)) * adapter.scaling
    if "sigma" in wanted:
        gradients["sigma"] = _through_transform(adapter, Sigma, torch.einsum("stir,stjr->sijr", dz, u))
    if "A" in wanted:
        du = torch.einsum("ijr,stir->stjr", Sigma, dz)
        gradients["A"] = torch.einsum("stjr,stjp->srjp", du, x).reshape(samples, *A.shape)
    return gradients


def _through_transform(adapter: BoraAdapter, Sigma: Tensor, dSigma: Tensor) -> Tensor:
    """Return dsigma for dSigma, both `[samples, b, b, r]`."""
    if adapter.sigma_transform == "identity":
        return dSigma
    sigma = adapter.sigma.detach()
    mean = sigma.abs().mean()
    # exp_norm gives an all-zero sigma the gradient 0.
    inverse = torch.where(mean > 0, mean.reciprocal(), torch.zeros_like(mean))
    g = dSigma * Sigma * inverse
    along = (g * (sigma * inverse)).sum(dim=(1, 2, 3), keepdim=True) / sigma.numel()
    return g - sigma.sign() * along


@register_grad_sampler(BoraAdapter)  # type: ignore[untyped-decorator]
def _gradients_for_opacus(
    adapter: BoraAdapter, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    x = activations[0]
    # Opacus takes the batch size from the last positional input. If that is a base weight, it has already multiplied a
    # mean loss' gradient by the wrong number.
    assumed = getattr(adapter, "max_batch_len", x.shape[0])
    if assumed != x.shape[0]:
        raise ValueError(
            f"Opacus takes the batch to hold {assumed} samples where it holds {x.shape[0]}: it looks at the last input,"
            " which is a base weight here; call the adapter without the base layer's weights, or use train_privately"
        )
    trained = {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    gradients = adapter_sample_gradients(adapter, x, backprops, frozenset(trained))
    return {trained[name]: gradient for name, gradient in gradients.items()}


@register_norm_sampler(BoraAdapter)  # type: ignore[untyped-decorator]
def _norms_for_opacus(adapter: BoraAdapter, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    gradients = _gradients_for_opacus(adapter, activations, backprops)
    return {parameter: gradient.flatten(1).norm(dim=1) for parameter, gradient in gradients.items()}
