"""Merges that form the mean of the products exactly, in factored form, and then reduce it to the adapter's rank."""

import math

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors, factor_mean, merge, refactorize, truncate
from bora_fl.blocks.factors import blocked
from bora_fl.strategies.averaging import average
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.products import gram_of_products
from bora_fl.strategies.sigma_range import restore_range


def refactor(layer: LayerRound) -> LayerMerge:
    """Fit block factors of the adapter's rank to the mean of the products (ours).

    `min over (B, Sigma, A) of Σ_ij ‖M_ij − B_i diag(Sigma_ij) A_j‖²` with `M = Σ_k w_k delta_W^k`, started from the
    factor mean and so never worse than it. For one block this is the truncated SVD of M.
    """
    return _with_residual(layer, block_fit(layer))


def flexlora(layer: LayerRound) -> LayerMerge:
    """Truncate the SVD of the mean product to the adapter's rank (FlexLoRA, arXiv:2402.11505).

    `M = U S Vᵀ`, `B = U_r S_r`, `A = V_rᵀ`. For more than one block the result is plain LoRA of rank r written in
    block form, Sigma alike in every block pair: optimal among matrices of rank r, but a block adapter's product has
    up to rank b·r, so its diversity is lost; that is the published method, and what `refactor` improves on. What
    differs: M is never formed, the SVD is that of its cores.
    """
    return _with_residual(layer, truncated_svd(layer))


def florist(layer: LayerRound) -> LayerMerge:
    """Keep as many components as hold a share of the energy (FLoRIST, arXiv:2506.09199).

    The rank is the smallest p with `Σ_{k≤p} s_k² ≥ threshold · Σ_k s_k²` over the spectrum of the stacked updates, at
    most the adapter's rank, per layer. What differs: the paper has no upper bound. For more than one block, where
    there is no spectrum, the energies are those of the components of the block fit.
    """
    fit = truncated_svd(layer) if layer.current.num_blocks == 1 else block_fit(layer)
    energy = fit.component_energy().sort(descending=True).values.cumsum(0)
    total = max(size(layer.mean_product()) ** 2, float(energy[-1]))
    reached = energy >= layer.settings.threshold * total * (1 - 1e-9)
    rank = int(reached.nonzero()[0]) + 1 if bool(reached.any()) else fit.rank
    return _with_residual(layer, restore_range(truncate(fit, rank), layer.sigma_transform))


def block_fit(layer: LayerRound) -> BlockFactors:
    """The best block factors of the adapter's rank, warm-started from the factor mean."""
    target = layer.mean_product()
    if size(target) == 0:  # B is zero everywhere: nothing to fit, and A must stay trainable
        return restore_range(layer.current, layer.sigma_transform)
    fit = refactorize(
        target,
        layer.rank,
        start=_start(layer),
        sigma_transform=layer.sigma_transform,
        sweeps=layer.settings.sweeps,
    )
    if layer.sigma_transform == "exp_norm" and not bool((fit.factors.sigma > 0).all()):
        return average(layer).current
    return restore_range(fit.factors, layer.sigma_transform)


def _start(layer: LayerRound) -> BlockFactors | None:
    mean = factor_mean(layer.updates, layer.weights)
    return mean if mean.rank == layer.rank else None


def truncated_svd(layer: LayerRound) -> BlockFactors:
    """Plain LoRA factors of the mean product's best approximation of the adapter's rank, in block form.

    A's rows get the norm they have on average in the factor mean, at which clients train them; B takes the rest.
    """
    target = layer.mean_product()
    if size(target) == 0:
        return restore_range(layer.current, layer.sigma_transform)
    left, sigma, right = blocked(target)
    b, rank = target.num_blocks, layer.rank
    rows, row_cores = torch.linalg.qr(left)
    columns, column_cores = torch.linalg.qr(right)
    cores = torch.einsum("ikc,ijc,jlc->ikjl", row_cores, sigma, column_cores)
    U, S, Vh = torch.linalg.svd(cores.reshape(b * cores.shape[1], b * cores.shape[3]), full_matrices=False)
    U, S, Vh = (_padded(t, rank) for t in (U.T, S, Vh))
    peak = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)  # an SVD leaves the signs open
    B = (rows @ (U * S[:, None] * sign).T.reshape(b, -1, rank)).reshape(-1, rank)
    A = (columns @ (Vh * sign).reshape(rank, b, -1).permute(1, 2, 0)).permute(2, 0, 1).reshape(rank, -1)
    norm = factor_mean(layer.updates, layer.weights).A.double().norm(dim=1).mean()
    dtype, scaling = layer.current.B.dtype, layer.current.scaling
    ones = torch.ones(b, b, rank, dtype=dtype)
    factors = BlockFactors((B / (norm * scaling)).to(dtype), ones, (A * norm).to(dtype), scaling)
    return restore_range(factors, layer.sigma_transform)


def _padded(values: Tensor, rank: int) -> Tensor:
    """The first `rank` rows, with zeros where there are fewer."""
    missing = max(rank - values.shape[0], 0)
    return torch.cat([values[:rank], values.new_zeros(missing, *values.shape[1:])])


def _with_residual(layer: LayerRound, fit: BlockFactors) -> LayerMerge:
    """Drop, carry or fold what the fit does not hold, within the rank budget."""
    mode = layer.settings.residual
    if mode == "drop":
        return LayerMerge(fit)
    target = layer.mean_product()
    residual = merge([target, fit], [1.0, -1.0])
    if size(residual) <= negligible(target):
        return LayerMerge(fit)
    small = compressed(residual, layer.settings.residual_rank, layer.settings.sweeps)
    return LayerMerge(fit, carried=small) if mode == "carry" else LayerMerge(fit, fold=small)


def compressed(factors: BlockFactors, rank: int, sweeps: int) -> BlockFactors:
    """The best block factors of at most the given rank; any Sigma is allowed, since nobody trains them."""
    if factors.rank <= rank:
        return factors
    return refactorize(factors, rank, sigma_transform="identity", sweeps=sweeps).factors


def size(factors: BlockFactors) -> float:
    """Frobenius norm from the factors' Gram matrices: fast, and accurate to about 1e-8 of the components' norm."""
    return math.sqrt(max(float(gram_of_products([factors])), 0.0))


def negligible(target: BlockFactors) -> float:
    """The norm below which a residual of the target is rounding."""
    return max(8 * torch.finfo(target.B.dtype).eps, 1e-7) * size(target)
