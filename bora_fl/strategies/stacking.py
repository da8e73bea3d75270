"""Exact merges: what the factors cannot hold goes into the clients' frozen weights, as a base delta."""

import math

import torch

from bora_fl.blocks import BlockFactors, merge
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.products import size
from bora_fl.strategies.refactoring import negligible


def flora(layer: LayerRound) -> LayerMerge:
    """Stack all clients, merge the stack into the frozen weight, start afresh (FLoRA, arXiv:2409.05976).

    `W ← W + [w_1 B^1 … w_K B^K] [A^1; …; A^K]`, then a new A is drawn and B = 0. In block form the stack keeps every
    client's Sigma, so it is exact for any number of blocks and any mix of ranks.
    """
    return LayerMerge(restarted(layer.current, layer), fold=layer.mean_product())


def fold_rest(layer: LayerRound, current: BlockFactors) -> LayerMerge:
    """Merge what the merged factors miss into the frozen weight, exactly (FedEx-LoRA, arXiv:2410.09432).

    `W ← W + Σ_k w_k delta_W^k − B̄ Ā`, so that frozen weight plus adapter is the mean of the clients' models. The
    residual is sent as the stack it is, of rank `Σ_k r_k + r`.
    """
    target = layer.mean_product()
    residual = merge([target, current], [1.0, -1.0])
    return LayerMerge(current, fold=residual if size(residual) > negligible(target) else None)


def restarted(factors: BlockFactors, layer: LayerRound) -> BlockFactors:
    """New factors as at the start of a run: A Kaiming-uniform, Sigma drawn anew, B zero; one seed, one result."""
    generator = torch.Generator().manual_seed(layer.seed)
    n, b, rank = factors.A.shape[1], factors.num_blocks, layer.rank
    A = (2 * torch.rand(rank, n, generator=generator) - 1) / math.sqrt(n)
    log = 2 * torch.rand(b, b, rank, generator=generator) - 1
    sigma = (log / log.abs().mean()).exp()
    return BlockFactors(
        factors.B.new_zeros(factors.B.shape[0], rank), sigma.to(factors.sigma), A.to(factors.A), factors.scaling
    )
