"""Merges that form the mean of the products exactly, in factored form, and then reduce it to the adapter's rank."""

import torch

from bora_fl.blocks import BlockFactors, factor_mean, merge, padded, refactorize, residual, truncate
from bora_fl.blocks.block_cores import compressed
from bora_fl.blocks.left_fit import fit_left
from bora_fl.blocks.svd import leading_svd
from bora_fl.strategies.alignment import align
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.products import size

_ROUNDING = 8  # singular values below this many units of rounding are zero


def refactor(layer: LayerRound) -> LayerMerge:
    """Fit block factors of the adapter's rank to the mean of the products, or to `LayerRound.next_product` (ours).

    `min over (B, Sigma, A) of Σ_ij ‖M_ij − B_i diag(Sigma_ij) A_j‖²` with `M = Σ_k w_k delta_W^k`, started from the
    factor mean and so never worse than it. For one block this is the truncated SVD of M, rotated to the factor mean's
    factors where all clients have the adapter's rank. With `strategy.refit = "B"` only B is solved for, which keeps A
    and Sigma where the clients train well.
    """
    return LayerMerge(block_fit(layer))


def flexlora(layer: LayerRound) -> LayerMerge:
    """Truncate the SVD of the mean product to the adapter's rank (FlexLoRA, arXiv:2402.11505).

    M is the mean product, or `LayerRound.next_product` (ours): `M = U S Vᵀ`, `B = U_r S_r`, `A = V_rᵀ`, Sigma = 1. For
    more than one block the result is plain LoRA of rank r written in block form: optimal among matrices of rank r, but
    a block adapter's product has up to rank b·r, so its diversity is lost; that is the published method, and what
    `refactor` improves on. What differs: M is never formed, the SVD is that of its cores; a component without energy
    gets B = 0 and the clients' mean A, so that it can be trained.
    """
    return LayerMerge(truncated_svd(layer))


def florist(layer: LayerRound) -> LayerMerge:
    """Keep as many components as hold a share of the energy (FLoRIST, arXiv:2506.09199).

    The rank is the smallest p with `Σ_{k≤p} s_k² ≥ threshold · Σ_k s_k²` over the spectrum of the stacked updates, at
    most the adapter's rank, per layer; the adapter's rank if the product is zero. What differs: the paper has no upper
    bound. For more than one block, where there is no spectrum, the energies are those of the components of the block
    fit.
    """
    fit = truncated_svd(layer) if layer.current.num_blocks == 1 else block_fit(layer)
    energy = fit.component_energy().sort(descending=True).values.cumsum(0)
    total = max(size(layer.next_product()) ** 2, float(energy[-1]))
    reached = energy >= layer.settings.threshold * total * (1 - 1e-9)
    rank = int(reached.nonzero()[0]) + 1 if total > 0 and bool(reached.any()) else fit.rank
    return LayerMerge(truncate(fit, rank))


def block_fit(layer: LayerRound) -> BlockFactors:
    """The best block factors of the adapter's rank, warm-started from the factor mean, in canonical form.

    One block's are those of an SVD, whose last components are mostly noise; Adam moves every component by as much. They
    are rotated to where the clients' were, unless some clients' ranks are smaller: what these get must hold the most
    energy, which the SVD's first components do.
    """
    start = padded(factor_mean(layer.updates, layer.weights), layer.rank)
    only_left = layer.settings.refit == "B" and layer.current.num_blocks > 1
    fit = fit_left(*layer.next_parts(), start, layer.sigma_transform) if only_left else None
    if fit is not None:
        return fit
    found = refactorize(
        layer.next_product(),
        layer.rank,
        start=start,
        sigma_transform=layer.sigma_transform,
        only_B=only_left,
        sweeps=layer.settings.sweeps,
    ).factors
    equal = all(update.rank == layer.rank for update in layer.updates)
    return align(found, start) if equal and layer.current.num_blocks == 1 else found


def truncated_svd(layer: LayerRound) -> BlockFactors:
    """The next product's best approximation by a matrix of the adapter's rank: `B = U_r S_r`, `A = V_rᵀ`, Sigma = 1."""
    target, scaling = layer.next_product(), layer.current.scaling
    whole = compressed(target)
    svd = leading_svd(whole.target, layer.rank)
    values = svd.sigma[0, 0]
    # What is left where the clients cancel is rounding of their components, and has no direction.
    alive = values > _ROUNDING * torch.finfo(torch.float64).eps * target.component_energy().sum().sqrt()
    start = padded(factor_mean(layer.updates, layer.weights), layer.rank)
    left, right = whole.rows.expand(svd.left), whole.columns.expand(svd.right)
    B = torch.where(alive, left.reshape(-1, layer.rank) * values / scaling, 0.0)
    A = torch.where(alive[:, None], right.permute(2, 0, 1).reshape(layer.rank, -1), start.A.double())
    return BlockFactors(B.to(start.B), torch.ones_like(start.sigma), A.to(start.A), scaling)


def keep_rest(layer: LayerRound, fit: BlockFactors) -> LayerMerge:
    """Drop, carry or send as a base delta what the fit does not hold, and keep the velocity, within the rank budget."""
    mode, target, velocity = layer.settings.residual, layer.next_product(), _velocity(layer)
    if mode == "drop" or size(merge([target, fit], [1.0, -1.0])) <= negligible(target):
        return LayerMerge(fit, velocity=velocity)
    rest = residual(target, fit, layer.settings.residual_rank)
    carried, fold = (rest, None) if mode == "carry" else (None, rest)
    return LayerMerge(fit, carried, fold, velocity)


def _velocity(layer: LayerRound) -> BlockFactors | None:
    """``V ← β V + Δ`` of `LayerRound.next_product`, cut to the rank budget; None without momentum."""
    beta = layer.settings.product_momentum
    if beta == 0:
        return None
    before = [] if layer.velocity is None else [layer.velocity]
    target = merge([*layer.updates, *before], [*layer.weights, *[beta] * len(before)])
    return residual(target, layer.current, layer.settings.residual_rank)


def negligible(target: BlockFactors) -> float:
    """The norm below which a residual of the target is rounding."""
    return max(8 * torch.finfo(target.B.dtype).eps, 1e-7) * size(target)
