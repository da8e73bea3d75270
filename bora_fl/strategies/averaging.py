"""Merges that average factors: the result is the product of the means, not the mean of the products."""

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors, factor_mean, normalize_sigma
from bora_fl.blocks.factors import blocked, rescaled
from bora_fl.blocks.gauge import block_row_norms
from bora_fl.blocks.resizing import leading_components
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.products import gram_of_products

_FAIR_RIDGE = 1e-2  # LoRA-FAIR's regularization weight, here relative to the mean curvature of B


def average(layer: LayerRound) -> LayerMerge:
    """Average B, the effective Sigma and A separately (FedIT, arXiv:2305.05644).

    `B = Σ_k w_k B^k`, `A = Σ_k w_k A^k` and, for BoRA, `Sigma = Σ_k w_k Sigma^k`; the raw sigma of `exp_norm` has no
    scale, so its mean would mean nothing.
    """
    return LayerMerge(factor_mean(layer.updates, layer.weights))


def hetlora(layer: LayerRound) -> LayerMerge:
    """Zero-pad to the global rank and weight by the norm of the product (HetLoRA, arXiv:2401.06432).

    `B = Σ_k p_k pad(B^k)`, likewise A, with `p_k ∝ w_k ‖delta_W^k‖_F`: a client whose update is larger counts more.
    What differs: the paper weights by the norm alone; here examples count too, so that a client without data has no
    say. Clients do not prune their own rank. A client of rank r_k trains the r_k components of most energy, and these
    are the ones it is padded to. Sigma is averaged over the clients that hold the component; one that nobody holds
    keeps its A and Sigma, and its B is zero.
    """
    norms = gram_of_products(layer.updates).diagonal().clamp_min(0).sqrt().tolist()
    weights = [w * norm for w, norm in zip(layer.weights, norms, strict=True)] if max(norms) > 0 else layer.weights
    total, current = sum(weights), layer.current
    mean = {part: torch.zeros_like(getattr(current, part), dtype=torch.float64) for part in ("B", "sigma", "A")}
    held = torch.zeros(current.rank, dtype=torch.float64)
    for update, weight in zip(layer.updates, weights, strict=True):
        components, theirs = _at_sent_scales(update, layer)
        share = weight / total
        held[components] += share
        mean["B"][:, components] += share * theirs.B.double() * (theirs.scaling / current.scaling)
        mean["sigma"][..., components] += share * theirs.sigma.double()
        mean["A"][components] += share * theirs.A.double()
    nobody = held == 0
    sigma = torch.where(nobody, current.sigma.double(), mean["sigma"] / torch.where(nobody, 1.0, held))
    A = torch.where(nobody[:, None], current.A.double(), mean["A"])
    dtype = current.B.dtype
    return LayerMerge(BlockFactors(mean["B"].to(dtype), sigma.to(dtype), A.to(dtype), current.scaling))


def _at_sent_scales(update: BlockFactors, layer: LayerRound) -> tuple[Tensor, BlockFactors]:
    """The components of the current adapter that a client of this rank was sent, and its update at their scales.

    A client of a smaller rank normalizes the Sigma that it cuts out (`at_rank`), which scales B, Sigma and A against
    each other; here that is undone.
    """
    current, rank = layer.current, update.rank
    if rank == current.rank:
        return torch.arange(rank), update
    components = leading_components(current, rank)
    sent = BlockFactors(current.B[:, components], current.sigma[..., components], current.A[components])
    received = normalize_sigma(sent, layer.sigma_transform)
    if received is sent:
        return components, update
    columns = (block_row_norms(sent) / block_row_norms(received)).nan_to_num(1.0)
    rows = (received.sigma.double() / sent.sigma.double() / columns).mean(1)
    return components, rescaled(update, rows, columns)


def lora_fair(layer: LayerRound) -> LayerMerge:
    """Correct the mean B so that its product with the mean A approaches the mean product (LoRA-FAIR, arXiv:2411.14961).

    `B = argmin ‖M − B Ā‖² + λ ‖B − B̄‖²`, solved in closed form per row block; for BoRA with the mean Sigma in between:
    `B_i (Σ_j D_ij A_j A_jᵀ D_ij + λ I) = Σ_k w_k B_i^k Σ_j D_ij^k A_j^k A_jᵀ D_ij + λ B̄_i`. What differs: the paper
    maximizes a cosine similarity by gradient steps; here the distance itself is minimized, with λ = .01 of the mean
    curvature, so the merge is never further from the mean product than plain averaging.
    """
    mean = factor_mean(layer.updates, layer.weights)
    left, sigma, right = blocked(mean)
    normal = torch.einsum("ijk,jkl,ijl->ikl", sigma, right.mT @ right, sigma)
    ridge = _FAIR_RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(torch.float64).tiny
    goal = ridge[:, None, None] * left
    for update, weight in zip(layer.updates, layer.weights, strict=True):
        their_left, their_sigma, their_right = blocked(update)
        goal = goal + weight * their_left @ torch.einsum("ijk,jkl,ijl->ikl", their_sigma, their_right.mT @ right, sigma)
    normal = normal + torch.diag_embed(ridge[:, None].expand(-1, mean.rank))
    B = torch.linalg.solve(normal, goal, left=False)
    return LayerMerge(BlockFactors(B.reshape(mean.B.shape).to(mean.B.dtype), mean.sigma, mean.A, mean.scaling))


def share_right(layer: LayerRound) -> LayerMerge:
    """Average A alone; B and Sigma never leave the clients (FedSA-LoRA, arXiv:2410.01463): `A = Σ_k w_k A^k`."""
    A = torch.zeros_like(layer.current.A, dtype=torch.float64)
    for update, weight in zip(layer.updates, layer.weights, strict=True):
        A += weight * update.A.double()
    current = layer.current
    return LayerMerge(BlockFactors(current.B, current.sigma, A.to(current.A.dtype), current.scaling))
