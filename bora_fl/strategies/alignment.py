"""Write a client's update in the coordinates of a reference before factors are averaged or compared.

Equal updates can have different factors. For one block these differ by any invertible matrix between B and A, of which
the rotations leave both factors' norms alone. For more than one block there is no rotation freedom; of the same kind,
with Sigma left positive, are permutations of the components and a common sign of `B[:, k]` and `A[k, :]`.
"""

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors, factor_mean
from bora_fl.blocks.factors import rescaled
from bora_fl.blocks.gauge import block_row_norms
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound


def fedrot(layer: LayerRound) -> LayerMerge:
    """Rotate every client to the received factors, then average (FedRot-LoRA, arXiv:2602.23638).

    `B = Σ_k w_k B^k Q_k`, `A = Σ_k w_k Q_kᵀ A^k` with orthogonal `Q_k` that bring `B^k Q_k` and `Q_kᵀ A^k` closest to
    the factors the clients were sent. What differs: the server rotates, not the client; both factors enter one
    Procrustes problem, each at its own scale, where the paper aligns one of them; the rotation is not softened. For
    more than one block `Q_k` is a signed permutation, the freedom that block factors have.
    """
    aligned = [align(update, layer.current) for update in layer.updates]
    return LayerMerge(factor_mean(aligned, layer.weights))


def align(factors: BlockFactors, reference: BlockFactors) -> BlockFactors:
    """The same update with factors as close to the reference's as its freedom allows.

    Args:
        factors: The factors to rewrite.
        reference: Factors of the same shape, block count and rank.

    Returns:
        For one block `(B diag(Sigma) Q, Qᵀ A)` with the orthogonal Procrustes solution Q, and the reference's Sigma
        taken out of B again; for more, the components permuted and signed.
    """
    if factors.num_blocks > 1:
        return _match_components(factors, reference)
    B = factors.B.double() * factors.sigma.double()[0, 0]
    shape = torch.where(reference.sigma == 0, 1.0, reference.sigma.double())
    U, _, Vh = torch.linalg.svd(_overlap(B, reference.B.double() * shape[0, 0], factors.A, reference.A))
    Q = U @ Vh
    return BlockFactors(
        (B @ Q / shape[0, 0]).to(factors.B.dtype),
        shape.to(factors.sigma.dtype),
        (Q.T @ factors.A.double()).to(factors.A.dtype),
        factors.scaling,
    )


def in_gauge_of(factors: BlockFactors, reference: BlockFactors) -> BlockFactors:
    """The same update written like the reference, using all the freedom that a product leaves.

    Strategies that refactorize return factors in coordinates of their own; a difference of factors means something only
    after this.

    Args:
        factors: The factors to rewrite.
        reference: Factors of the same shape, block count and rank.

    Returns:
        For one block `(B T⁻¹, T A)` with `T A` closest to the reference's A, its singular values kept within a factor
        of ten so that B stays bounded, and the reference's Sigma. For more, the components matched and signed, every
        A_j[k] at the norm it has in the reference, every `Sigma[i, :, k]` likewise, and B taking the rest.
    """
    if factors.num_blocks > 1:
        return _at_scales_of(_match_components(factors, reference), reference)
    shape = torch.where(reference.sigma == 0, 1.0, reference.sigma.double())[0, 0]
    A = factors.A.double()
    U, S, Vh = torch.linalg.svd(reference.A.double() @ torch.linalg.pinv(A))
    if not bool(S[0] > 0):
        return align(factors, reference)
    S = S.clamp_min(0.1 * float(S[0]))
    B = factors.B.double() * factors.sigma.double()[0, 0] @ ((Vh.T / S) @ U.T) / shape
    return BlockFactors(
        B.to(factors.B.dtype),
        shape.expand_as(factors.sigma).to(factors.sigma.dtype),
        ((U * S) @ Vh @ A).to(factors.A.dtype),
        factors.scaling,
    )


def _at_scales_of(factors: BlockFactors, reference: BlockFactors) -> BlockFactors:
    columns = _ratio(block_row_norms(reference), block_row_norms(factors))
    sigma = factors.sigma.double() / columns
    rows = _ratio(sigma.norm(dim=1), reference.sigma.double().norm(dim=1))
    return rescaled(factors, rows, columns)


def _ratio(wanted: Tensor, found: Tensor) -> Tensor:
    usable = (wanted > 0) & (found > 0)
    return torch.where(usable, wanted, 1.0) / torch.where(usable, found, 1.0)


def _overlap(B: Tensor, reference_B: Tensor, A: Tensor, reference_A: Tensor) -> Tensor:
    """`[r, r]`: likeness of component k (row) and the reference's component l (column), B and A each on its scale."""
    A, reference_A = A.double(), reference_A.double()
    size_B, size_A = B.norm() * reference_B.norm(), A.norm() * reference_A.norm()
    overlap = B.T @ reference_B / size_B if size_B > 0 else B.new_zeros(B.shape[1], B.shape[1])
    return overlap + A @ reference_A.T / size_A if size_A > 0 else overlap


def _match_components(factors: BlockFactors, reference: BlockFactors) -> BlockFactors:
    overlap = _overlap(factors.B.double(), reference.B.double(), factors.A, reference.A)
    order, signs = torch.empty(factors.rank, dtype=torch.long), torch.ones(factors.rank)
    left = overlap.abs().clone()
    for _ in range(factors.rank):  # greedy: components drift little in a round, so the best pairs are unambiguous
        k, column = divmod(int(left.argmax()), factors.rank)
        order[column] = k
        signs[column] = -1.0 if overlap[k, column] < 0 else 1.0
        left[k], left[:, column] = -1.0, -1.0
    B, A = factors.B[:, order] * signs.to(factors.B), factors.A[order] * signs.to(factors.A)[:, None]
    return BlockFactors(B, factors.sigma[..., order], A, factors.scaling)
