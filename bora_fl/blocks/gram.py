"""Merging and refactorizing in the norm of the layers' inputs (RegMean; Jin et al., ICLR 2023, arXiv:2212.09849).

With `G_k = E[x xᵀ]` over client k's inputs of a layer, the update that is closest to all clients' in what the layer
puts out, `min over M of Σ_k w_k E‖(M − M_k) x‖² = Σ_k w_k tr (M − M_k) G_k (M − M_k)ᵀ`, is

    M = (Σ_k w_k M_k G_k) Ḡ⁻¹,  Ḡ = Σ_k w_k G_k.

Block `(i, j)` of M_k G_k mixes column blocks unless G_k is block-diagonal. So a Gram matrix here is the diagonal blocks
`[b, n/b, n/b]`, the whole matrix for one block, or only its diagonal `[b, n/b]`: then M is a stack with
`A_j^k G_kj Ḡ_j⁻¹` in the place of `A_j^k`. A fit in that norm is a plain fit of `A_j L_j` with `Ḡ_j = L_j L_jᵀ`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bora_fl.blocks.factors import BlockFactors, blocked, unblocked
from bora_fl.blocks.merging import merge
from bora_fl.blocks.refactorization import refactorize

Kind = Literal["blocks", "diagonal"]

_SHRINK = 0.9  # of what is off the diagonal, as RegMean does, so that the solve is well conditioned
_RIDGE = 1e-6  # of the mean diagonal
_POWERS = 20  # steps of the power method
# Times the median client's trace of a block, and its largest eigenvalue; MiniLM's on four silos are at most 1.2 and 1.4
# times them.
_MOST = 4.0


def gram_of(x: Tensor, num_blocks: int, kind: Kind) -> Tensor:
    """Sums over inputs `x [t, n]`: `[b, n/b, n/b]`, or `[b, n/b]`, float64."""
    blocks = x.double().reshape(len(x), num_blocks, x.shape[1] // num_blocks)
    return torch.einsum("tbp,tbq->bpq" if kind == "blocks" else "tbp,tbp->bp", *[blocks] * 2)


def packed(gram: Tensor) -> Tensor:
    """The upper triangle of every block, `[b, p (p + 1) / 2]`; a diagonal is as small as it can be."""
    if gram.dim() == 2:
        return gram
    rows, columns = torch.triu_indices(*gram.shape[1:])
    return gram[:, rows, columns]


def unpacked(values: Tensor, num_blocks: int, columns: int, kind: Kind) -> Tensor:
    """The inverse of `packed`, in float64.

    Args:
        values: From `packed`.
        num_blocks: b.
        columns: n, of the layer.
        kind: What was asked for.

    Raises:
        ValueError: If shape or dtype are others, a value is not finite, or no inputs have such a matrix, by more than
            `shrunk` makes up for.
    """
    size = columns // num_blocks
    wanted = (num_blocks, size if kind == "diagonal" else size * (size + 1) // 2)
    if values.shape != wanted:
        raise ValueError(f"a Gram matrix has shape {tuple(values.shape)}, expected {wanted}")
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a Gram matrix is {values.dtype}, expected torch.float32 or torch.float64")
    if not bool(values.isfinite().all()):
        raise ValueError("a Gram matrix holds values that are not finite")
    gram = values.double()
    if kind == "blocks":
        first, second = torch.triu_indices(size, size)
        gram = gram.new_zeros(num_blocks, size, size)
        gram[:, first, second] = gram[:, second, first] = values.double()
    diagonal = gram if kind == "diagonal" else gram.diagonal(dim1=1, dim2=2)
    if bool((diagonal < 0).any()):
        raise ValueError("a Gram matrix has a negative diagonal")
    if kind == "blocks" and bool((gram.square() > 1.001 * diagonal[:, :, None] * diagonal[:, None, :] + 1e-30).any()):
        raise ValueError("a Gram matrix has an entry beyond what its diagonal allows")
    if kind == "blocks" and bool(torch.linalg.cholesky_ex(shrunk(gram)).info.any()):
        raise ValueError("a Gram matrix is that of no inputs: it has a negative side")
    return gram


def bounded(grams: Sequence[Tensor]) -> list[Tensor]:
    """The clients' Gram matrices, with blocks of more than `_MOST` times the median client's trace scaled down to that,
    and eigenvalues of more than as many times its largest cut to that.

    A client's say in a merge is its weight times its Gram matrix, in each direction of the inputs. What no check of one
    reply can judge is its size, and how much of it is in one direction.

    Args:
        grams: One per client, all of one kind.
    """
    traces = torch.stack([_diagonal(gram).sum(1) for gram in grams])
    median = traces.median(0).values  # the lower of two
    shares = (_MOST * median / traces.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
    sized = [gram * share.reshape(-1, *[1] * (gram.dim() - 1)) for gram, share in zip(grams, shares, strict=True)]
    most = _MOST * torch.stack([_largest(gram) for gram in sized]).median(0).values
    return [_cut(gram, most) for gram in sized]


def _largest(gram: Tensor) -> Tensor:
    """The largest eigenvalue of each block, or a little less: a client can say that its own is smaller, no more."""
    if gram.dim() == 2:
        return gram.double().amax(1)
    gram = gram.double()
    first = _diagonal(gram).argmax(1)
    vector = gram[torch.arange(len(gram)), first].unsqueeze(2)
    for _ in range(_POWERS):
        vector = gram @ torch.nn.functional.normalize(vector, dim=1)
    unit = torch.nn.functional.normalize(vector, dim=1)
    return (unit.mT @ gram @ unit)[:, 0, 0]


def _cut(gram: Tensor, most: Tensor) -> Tensor:
    """The Gram matrix with no eigenvalue of a block above `most [b]`; itself where none is."""
    if gram.dim() == 2:
        return gram.minimum(most[:, None].to(gram.dtype))
    room = most[:, None, None] * (1 + 1e-9) * torch.eye(gram.shape[1], dtype=torch.float64) - gram.double()
    over = torch.linalg.cholesky_ex(room).info > 0
    if not bool(over.any()):
        return gram
    values, vectors = torch.linalg.eigh(gram[over].double())
    found = gram.clone()
    found[over] = ((vectors * values.minimum(most[over, None]).unsqueeze(1)) @ vectors.mT).to(gram.dtype)
    return found


def shrunk(gram: Tensor) -> Tensor:
    """The Gram matrix with its off-diagonal shrunk, positive definite, float64."""
    gram, diagonal = gram.double(), _diagonal(gram)
    ridge = _RIDGE * diagonal.mean() + torch.finfo(torch.float64).tiny
    if gram.dim() == 2:
        return gram + ridge
    return _SHRINK * gram + torch.diag_embed((1 - _SHRINK) * diagonal + ridge)


def _diagonal(gram: Tensor) -> Tensor:
    return (gram if gram.dim() == 2 else gram.diagonal(dim1=1, dim2=2)).double()


def merge_in_norm(
    factors: Sequence[BlockFactors], weights: Sequence[float], grams: Sequence[Tensor]
) -> tuple[BlockFactors, Tensor]:
    """The update M of the module's text, exactly, stacked, and Ḡ.

    Args:
        factors: One per client, of one shape and block count, of any ranks.
        weights: One per client; they sum to one.
        grams: One per client, all of one kind; they are shrunk here.

    Raises:
        ValueError: As `merge`; or if a sum of Gram matrices has no Cholesky factor.
    """
    ours = [shrunk(gram) for gram in grams]
    mean = torch.stack([weight * gram for weight, gram in zip(weights, ours, strict=True)]).sum(0)
    root = _root(mean)
    moved = []
    for f, gram in zip(factors, ours, strict=True):
        left, sigma, right = blocked(f)
        right = gram[..., None] * right if gram.dim() == 2 else gram @ right
        right = right / mean[..., None] if gram.dim() == 2 else torch.cholesky_solve(right, root)
        moved.append(unblocked(left, sigma, right, f.scaling or 1.0, torch.float64))
    return merge(moved, weights), mean


def refactorize_in_norm(
    target: BlockFactors,
    rank: int,
    gram: Tensor,
    *,
    start: BlockFactors,
    sigma_transform: str,
    only_B: bool,
    sweeps: int,
) -> BlockFactors:
    """Fit `min Σ_ij ‖(M_ij − B_i diag(Sigma_ij) A_j) L_j‖²`; see `refactorize` for the arguments.

    Returns:
        Factors in the start's dtype. The norms of A's rows, and the order of components, are those of the canonical
        form in the coordinates `A_j L_j`; Sigma is in the transform's range.
    """
    root = _root(gram)
    fit = refactorize(
        _in_coordinates(target, root),
        rank,
        start=_in_coordinates(start.to(torch.float64), root),
        sigma_transform=sigma_transform,
        only_B=only_B,
        sweeps=sweeps,
    ).factors
    left, sigma, right = blocked(fit)
    diagonal = root.dim() == 2
    right = right / root[..., None] if diagonal else torch.linalg.solve_triangular(root.mT, right, upper=True)
    return unblocked(left, sigma, right, fit.scaling, start.B.dtype)


def _root(gram: Tensor) -> Tensor:
    """L with `G = L Lᵀ`, or the square root of a diagonal."""
    root: Tensor
    if gram.dim() == 2:
        root = gram.sqrt()
        return root
    root, wrong = torch.linalg.cholesky_ex(gram)
    if bool(wrong.any()):
        raise ValueError("the mean of the clients' Gram matrices is not positive definite")
    return root


def _in_coordinates(factors: BlockFactors, root: Tensor) -> BlockFactors:
    left, sigma, right = blocked(factors)
    right = root[..., None] * right if root.dim() == 2 else root.mT @ right
    return unblocked(left, sigma, right, factors.scaling or 1.0, torch.float64)
