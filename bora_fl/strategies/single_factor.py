"""Strategies that train one factor a round: the product is linear in it, so the mean of the factor is exact.

Which side is frozen, and in what form, is settled before the round (`prepare`), without changing the product.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors
from bora_fl.blocks.factors import rescaled
from bora_fl.blocks.gauge import block_row_norms
from bora_fl.blocks.normalization import transposed
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound


def mean_of_trained(layer: LayerRound) -> LayerMerge:
    """Average the trained factor and keep the frozen ones bit for bit.

    With A and Sigma frozen, `Σ_k w_k B^k Sigma A = (Σ_k w_k B^k) Sigma A`: the mean of the products exactly; likewise
    for A alone or Sigma alone (FFA-LoRA, arXiv:2403.12313; RoLoRA, arXiv:2502.01755; Fed-SB, arXiv:2502.15436).
    """
    parts = {"B": layer.current.B, "sigma": layer.current.sigma, "A": layer.current.A}
    for part in layer.trains & parts.keys():
        parts[part] = _mean([getattr(update, part) for update in layer.updates], layer.weights)
    return LayerMerge(BlockFactors(scaling=layer.current.scaling, **parts))


def _mean(tensors: list[Tensor], weights: object) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):  # type: ignore[call-overload]
        total += weight * tensor.double()
    return total.to(tensors[0].dtype)


def singular_rows(layer: LayerRound) -> LayerMerge:
    """Give A orthonormal rows, the right singular vectors of the product (FedSVD, arXiv:2505.12805).

    `B A = U S Vᵀ`, `B ← U S`, `A ← Vᵀ`, with Sigma taken into B. Rows of a block adapter cannot be rotated without
    changing the product; there the rows of every A_j are made orthonormal once, while B = 0, at norm 1/√b so that
    whole rows have norm 1, and since only B trains they stay so.
    """
    current = layer.current
    if current.num_blocks > 1 or bool((current.B == 0).all()):
        return orthonormal_rows(layer)
    polar, rest = _polar(current.A.double())
    U, S, Wh = torch.linalg.svd(current.B.double() * current.sigma.double()[0, 0] @ rest, full_matrices=False)
    if Wh.shape[0] < layer.current.rank:  # fewer rows than components
        return orthonormal_rows(layer)
    return LayerMerge(_plain(current, U * S, Wh @ polar))


def orthonormal_rows(layer: LayerRound) -> LayerMerge:
    """Make the rows of every A_j orthonormal at norm 1/√b, or as near to it as the product allows.

    One block: `A = P Q` with Q the nearest matrix of orthonormal rows (polar factor), `B ← B diag(Sigma) P`. More
    blocks while B = 0: every A_j becomes its polar factor. More blocks otherwise: the rows get their norm, not their
    right angles, by the gauge `A_j[k] β_jk`, `Sigma_ijk / β_jk`.
    """
    current = layer.current
    b = current.num_blocks
    if bool((current.B == 0).all()):
        return LayerMerge(BlockFactors(current.B, current.sigma, _orthonormal(current.A, b), current.scaling))
    if b == 1:
        polar, rest = _polar(current.A.double())
        B = current.B.double() * current.sigma.double()[0, 0] @ rest
        return LayerMerge(_plain(current, B, polar))
    norms = block_row_norms(current) * math.sqrt(b)
    return LayerMerge(rescaled(current, torch.ones_like(norms), 1 / torch.where(norms > 0, norms, 1.0)))


def orthonormal_frozen_side(layer: LayerRound) -> LayerMerge:
    """Re-orthonormalize whichever of A and B is frozen this round; nothing where Sigma trains."""
    if "B" in layer.trains:
        return orthonormal_rows(layer)
    if "A" in layer.trains:
        return LayerMerge(transposed(orthonormal_rows(replace(layer, current=transposed(layer.current))).current))
    return LayerMerge(layer.current)


def core_only(layer: LayerRound) -> LayerMerge:
    """Freeze orthonormal A and B so that only the core, for BoRA Sigma, trains (Fed-SB, arXiv:2502.15436).

    B must not be zero then, so it is drawn once, and the product this adds goes into the frozen weights with the
    opposite sign: the model does not change. What differs: the paper takes A and B from the singular vectors of a full
    gradient of the first batches and trains a dense r × r core; here they are random and Sigma holds b² r numbers.
    """
    current = layer.current
    if not bool((current.B == 0).all()):
        return LayerMerge(current)
    b = current.num_blocks
    drawn = torch.randn(current.B.T.shape, generator=torch.Generator().manual_seed(layer.seed), dtype=torch.float64)
    A, B = _orthonormal(current.A, b), _orthonormal(drawn, b).T.to(current.B.dtype).contiguous()
    start = BlockFactors(B, current.sigma, A, current.scaling)
    return LayerMerge(start, fold=BlockFactors(B, -current.sigma, A, current.scaling))


def _polar(A: Tensor) -> tuple[Tensor, Tensor]:
    """`A = P Q`: the nearest matrix Q of orthonormal rows (columns, if there are fewer of them), and P `[r, r]`."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U @ Vh, (U * S) @ U.T


def _orthonormal(A: Tensor, num_blocks: int) -> Tensor:
    blocks = A.double().chunk(num_blocks, dim=1)
    return torch.cat([_polar(block)[0] for block in blocks], 1).div(math.sqrt(num_blocks)).to(A.dtype)


def _plain(current: BlockFactors, B: Tensor, A: Tensor) -> BlockFactors:
    ones = torch.ones_like(current.sigma)
    return BlockFactors(B.to(current.B.dtype), ones, A.to(current.A.dtype), current.scaling)
