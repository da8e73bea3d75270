"""Merges that average factors: the result is the product of the means, not the mean of the products."""

import torch

from bora_fl.blocks import BlockFactors, factor_mean
from bora_fl.blocks.factors import blocked
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.products import gram_of_products
from bora_fl.strategies.sigma_range import restore_range

_FAIR_RIDGE = 1e-2  # LoRA-FAIR's regularization weight, here relative to the mean curvature of B


def average(layer: LayerRound) -> LayerMerge:
    """Average B, the effective Sigma and A separately (FedIT, arXiv:2305.05644).

    `B = Σ_k w_k B^k`, `A = Σ_k w_k A^k` and, for BoRA, `Sigma = Σ_k w_k Sigma^k`; the raw sigma of `exp_norm` has no
    scale, so its mean would mean nothing. The mean Sigma is then brought back into range without changing the product
    (`restore_range`).
    """
    return LayerMerge(restore_range(factor_mean(layer.updates, layer.weights), layer.sigma_transform))


def hetlora(layer: LayerRound) -> LayerMerge:
    """Zero-pad to the global rank and weight by the norm of the product (HetLoRA, arXiv:2401.06432).

    `B = Σ_k p_k pad(B^k)`, likewise A, with `p_k ∝ w_k ‖delta_W^k‖_F`: a client whose update is larger counts more.
    What differs: the paper weights by the norm alone; here examples count too, so that a client without data has no
    say. Clients do not prune their own rank. Sigma is averaged over the clients that hold the component.
    """
    norms = gram_of_products(layer.updates).diagonal().clamp_min(0).sqrt().tolist()
    weights = [w * norm for w, norm in zip(layer.weights, norms, strict=True)] if max(norms) > 0 else layer.weights
    mean = _at_rank(factor_mean(layer.updates, weights), layer)
    return LayerMerge(_by_energy(restore_range(mean, layer.sigma_transform)))


def lora_fair(layer: LayerRound) -> LayerMerge:
    """Correct the mean B so that its product with the mean A approaches the mean product (LoRA-FAIR, arXiv:2411.14961).

    `B = argmin ‖M − B Ā‖² + λ ‖B − B̄‖²`, solved in closed form per row block; for BoRA with the mean Sigma in between:
    `B_i (Σ_j D_ij A_j A_jᵀ D_ij + λ I) = Σ_k w_k B_i^k Σ_j D_ij^k A_j^k A_jᵀ D_ij + λ B̄_i`. What differs: the paper
    maximizes a cosine similarity by gradient steps; here the distance itself is minimized, with λ = .01 of the mean
    curvature, so the merge is never further from the mean product than plain averaging.
    """
    mean = restore_range(factor_mean(layer.updates, layer.weights), layer.sigma_transform)
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


def _at_rank(factors: BlockFactors, layer: LayerRound) -> BlockFactors:
    """Pad to the global rank with components of the current A and Sigma and a B of zero, which clients can train."""
    missing = layer.rank - factors.rank
    if missing <= 0:
        return factors
    rest = layer.current
    return BlockFactors(
        torch.cat([factors.B, factors.B.new_zeros(factors.B.shape[0], missing)], 1),
        torch.cat([factors.sigma, rest.sigma[..., -missing:]], 2),
        torch.cat([factors.A, rest.A[-missing:]], 0),
        factors.scaling,
    )


def _by_energy(factors: BlockFactors) -> BlockFactors:
    """Sort the components by energy: smaller clients receive the leading ones, and padding matches them again."""
    order = torch.argsort(factors.component_energy(), descending=True, stable=True)
    return BlockFactors(factors.B[:, order], factors.sigma[..., order], factors.A[order], factors.scaling)
