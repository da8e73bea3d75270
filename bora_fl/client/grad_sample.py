"""Per-sample gradients of adapters, in closed form, registered with Opacus. Of a BoRA adapter:

With x̂ the input, dY the gradient of the output and t running over the tokens of one sample s (the formulas of
`bora_fl.kernels.reference`, summed over one sample's tokens instead of over all):

    dB_i[s]        = scaling · Σ_t dY_i[s,t]ᵀ z_i[s,t]           z_i = Σ_j Sigma[i,j] ∘ u_j,  u_j = A_j x̂_j
    dSigma[i,j][s] = Σ_t dz_i[s,t] ∘ u_j[s,t]                    dz_i = scaling · B_iᵀ dY_i
    dA_j[s]        = Σ_t du_j[s,t]ᵀ x̂_j[s,t]                     du_j = Σ_i Sigma[i,j] ∘ dz_i
    dsigma[s]      = g/M − sign(sigma)·<g, z>/(N·M)              g = dSigma[s] ∘ Sigma, z = sigma/M, M = mean|sigma|

The last line is `exp_norm`'s; under `identity` dsigma = dSigma. The cost is that of the batch's gradient, and the
result is `r·(m + n)` numbers a sample where its activations are `tokens·(m + n)`: a second backward pass gains nothing.
"""

import math

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn

from bora_fl.adapters.layer import BoraAdapter
from bora_fl.adapters.ravan import RavanCores


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
    factors = _Factors(adapter)
    tokens = math.prod(x.shape[1:-1])
    x = x.detach().to(factors.dtype).reshape(len(x), tokens, factors.b, factors.p)
    dy = dy.to(factors.dtype).reshape(len(x), tokens, factors.b, factors.q)
    found = {name: x.new_empty(len(x), *factors.layout(name)) for name in wanted}
    _fill(factors, x, dy, found)
    gradients = {}
    if "A" in wanted:
        gradients["A"] = found["A"].transpose(1, 2).reshape(-1, *adapter.A.shape)
    if "sigma" in wanted:
        gradients["sigma"] = _through_transform(adapter, factors.Sigma, found["sigma"].permute(0, 2, 3, 1))
    if "B" in wanted:
        gradients["B"] = found["B"].transpose(2, 3).reshape(-1, *adapter.B.shape)
    return gradients


class _Factors:
    """An adapter's factors in the layouts that the products want."""

    def __init__(self, adapter: BoraAdapter) -> None:
        A, B, self.Sigma = adapter.A.detach(), adapter.B.detach(), adapter.effective_sigma().detach()
        self.b, self.r, self.scaling, self.dtype = len(self.Sigma), len(A), adapter.scaling, A.dtype
        self.p, self.q = A.shape[1] // self.b, B.shape[0] // self.b
        self.A = A.view(self.r, self.b, self.p).permute(1, 2, 0).contiguous()  # [b, p, r]
        self.B = B.view(self.b, self.q, self.r)  # [b, q, r]
        self.mix = (self.Sigma * self.scaling).permute(2, 0, 1).contiguous()  # [r, i, j]
        self.mix_back = self.mix.transpose(1, 2).contiguous()  # [r, j, i]

    def layout(self, name: str) -> tuple[int, ...]:
        """The shape in which one sample's gradient is summed."""
        b, r = self.b, self.r
        return {"A": (b, r, self.p), "sigma": (r, b, b), "B": (b, r, self.q)}[name]


def _fill(factors: _Factors, x: Tensor, dy: Tensor, out: dict[str, Tensor]) -> None:
    """Write the gradients of samples, `x [s, t, b, p]` and `dy [s, t, b, q]`, in `_Factors.layout`.

    No factor of a product is copied but the narrow ones: u and dz are `[b, r, s·t]`, z and du `[r, b, s·t]`, so that
    one sample's tokens are a contiguous row of each.
    """
    (samples, tokens, b, _), r = x.shape, factors.r
    u = _project(x, factors.A) if out.keys() & {"B", "sigma"} else None
    dz = _project(dy, factors.B) if out.keys() & {"A", "sigma"} else None
    if "B" in out and u is not None:
        z = torch.bmm(factors.mix, u.transpose(0, 1)).view(r, b, samples, tokens)
        for i in range(b):
            out["B"][:, i] = torch.bmm(z[:, i].transpose(0, 1), dy[:, :, i])
    if "sigma" in out and u is not None and dz is not None:
        left, right = (part.view(b, r * samples, tokens) for part in (dz, u))
        products = torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).view(r, samples, b, b)
        out["sigma"].copy_(products.transpose(0, 1)).mul_(factors.scaling)
    if "A" in out and dz is not None:
        du = torch.bmm(factors.mix_back, dz.transpose(0, 1)).view(r, b, samples, tokens)
        for j in range(b):
            out["A"][:, j] = torch.bmm(du[:, j].transpose(0, 1), x[:, :, j])


def _project(blocks: Tensor, factor: Tensor) -> Tensor:
    """Multiply `[s, t, b, width]` by `[b, width, r]`, laid out `[b, r, s·t]`."""
    return torch.bmm(blocks.flatten(0, 1).transpose(0, 1), factor).transpose(1, 2).contiguous()


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


@register_grad_sampler(RavanCores)  # type: ignore[untyped-decorator]
def _gradients_of_cores(cores: RavanCores, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """With `G[s] = Σ_t dz[s,t] u[s,t]ᵀ` for each head or block pair: `dH[s] = s ∘ G[s]`, `ds[s] = <G[s], H>`."""
    u, dz = (t.reshape(len(t), math.prod(t.shape[1:-2]), *t.shape[-2:]) for t in (activations[0], backprops))
    form = "xths,xthr->xhsr" if cores.H.dim() == 3 else "xtis,xtjr->xijsr"
    G = torch.einsum(form, dz, u)
    H, scales = cores.H.detach(), cores.scales.detach()
    found = {cores.H: G * scales[..., None, None], cores.scales: (G * H).sum((-2, -1))}
    return {parameter: gradient for parameter, gradient in found.items() if parameter.requires_grad}
