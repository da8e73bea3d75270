"""Inner products and distances of whole clients' updates, in factored form.

A client's update is the change of every layer's product and of every other trained tensor. All pairs are had from one
Gram matrix, computed from the small Gram matrices of the factors; nothing of a weight's size is formed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors, merge
from bora_fl.blocks.factors import blocked
from bora_fl.state import ALL, AdapterState
from bora_fl.strategies.layer_merge import Trains

_GROUP_RANK = 512  # components taken at a time
_MOST_PRODUCTS = 10**10  # multiplications spent on an exact norm
_PROBES = 64
_CHEAP_PRODUCTS = 2 * 10**7  # the same for a norm that is only reported
_CHEAP_PROBES = 4

Sum = tuple[Sequence[BlockFactors], Sequence[float]]
"""Updates and weights: their weighted sum."""


def gram_of_changes(states: Sequence[AdapterState], reference: AdapterState, shares: Trains = ALL) -> Tensor:
    """`G[k, l] = <d_k, d_l>` with `d_k` the k-th state's change against the reference.

    Args:
        states: K clients' states, of any ranks.
        reference: What they were sent.
        shares: The parts that leave the clients. Where B and Sigma stay there is no product to compare, and a layer's
            change is that of A.

    Returns:
        `[K, K]`, float64, symmetric.
    """
    everyone = [*states, reference]
    gram = torch.zeros(len(everyone), len(everyone), dtype=torch.float64)
    for layer in reference.layers:
        factors = [state.layers[layer] for state in everyone]
        gram += gram_of_products(factors) if shares & {"B", "sigma"} else _gram([f.A for f in factors])
    for name in reference.tensors:
        gram += _gram([state.tensors[name] for state in everyone])
    own, cross = gram[-1, -1], gram[:-1, -1]
    return gram[:-1, :-1] - cross[:, None] - cross[None, :] + own


def gram_of_products(factors: Sequence[BlockFactors]) -> Tensor:
    """Frobenius inner products of all pairs of updates, `[K, K]` in float64.

    `<M^k, M^l> = Σ_ij Σ_pq Sigma^k_ijp (B^kᵀ B^l)_i,pq (A^k A^lᵀ)_j,pq Sigma^l_ijq`, for groups of clients at a time,
    so that memory does not grow with the square of their number.
    """
    groups = _groups(factors)
    rows: list[list[Tensor]] = []
    for first in range(len(groups)):
        before = [rows[second][first].T for second in range(first)]
        rows.append([*before, *(_inner_products(groups[first], other) for other in groups[first:])])
    return torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)


def _groups(factors: Sequence[BlockFactors]) -> list[list[BlockFactors]]:
    groups: list[list[BlockFactors]] = []
    size = _GROUP_RANK
    for f in factors:
        if size + f.rank > _GROUP_RANK:
            groups.append([])
            size = 0
        groups[-1].append(f)
        size += f.rank
    return groups


def _inner_products(ours: Sequence[BlockFactors], theirs: Sequence[BlockFactors]) -> Tensor:
    (left, sigma, right), owner = _stacked(ours)
    (their_left, their_sigma, their_right), their_owner = _stacked(theirs)
    gram_right = right.mT @ their_right
    total = torch.zeros(left.shape[2], their_left.shape[2], dtype=torch.float64)
    for i in range(left.shape[0]):
        mixed = (sigma[i][:, :, None] * gram_right * their_sigma[i][:, None, :]).sum(0)
        total += (left[i].T @ their_left[i]) * mixed
    return owner.T @ total @ their_owner


def _stacked(factors: Sequence[BlockFactors]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The stack of all components, and whose each is: `[R, K]` of zeros and ones."""
    left, sigma, right = (torch.cat(group, dim=2) for group in zip(*map(blocked, factors), strict=True))
    owner = torch.repeat_interleave(torch.arange(len(factors)), torch.tensor([f.rank for f in factors]))
    return (left, sigma, right), torch.nn.functional.one_hot(owner, len(factors)).double()


def size(factors: BlockFactors) -> float:
    """Frobenius norm, without forming the product; accurate to about 1e-8 of the components' own norms."""
    return sizes([factors], [[1.0]])[0]


def sizes(factors: Sequence[BlockFactors], combinations: Sequence[Sequence[float]]) -> list[float]:
    """Frobenius norms of linear combinations of a few updates.

    Args:
        factors: Updates of one shape, stacks of many clients among them.
        combinations: Lists of one coefficient per update.

    Returns:
        The norms: from one Gram matrix while the components are few, else from the blocks themselves, one after the
        other, or, where that would take more than a second or so, from their action on random vectors: an unbiased
        estimate of the square, a few percent off, the same vectors for all combinations.
    """
    weights = torch.tensor([list(row) for row in combinations], dtype=torch.float64)
    (m, n), b, rank = factors[0].shape, factors[0].num_blocks, sum(f.rank for f in factors)
    if rank <= max(m, n) // b:
        gram = gram_of_products(factors)
        squares = torch.einsum("ck,kl,cl->c", weights, gram, weights).clamp_min(0.0)
    else:
        squares = _squares_of_blocks(factors, weights, probes=_PROBES if rank * m * n > _MOST_PRODUCTS else 0)
    norms: list[float] = squares.sqrt().tolist()
    return norms


def cheap_sizes(sums: Sequence[Sum], combinations: Sequence[Sequence[float]]) -> list[float]:
    """`sizes` for a report: what it costs grows with the number of components, not with its square.

    Args:
        sums: Weighted sums of updates of one shape.
        combinations: Lists of one coefficient per sum.

    Returns:
        The norms: exact while the components are few, else from the action on four random vectors in the updates' own
        dtype. The squares are unbiased; a layer's is off by about `0.7 / √rank` of itself, with the rank of what is
        measured, which averages out over the layers of a model.
    """
    (m, n), b = sums[0][0][0].shape, sums[0][0][0].num_blocks
    rank = sum(f.rank for parts, _ in sums for f in parts)
    if (m + n) * rank**2 <= _CHEAP_PRODUCTS:
        return sizes([merge(parts, weights) for parts, weights in sums], combinations)
    dtype, generator = sums[0][0][0].B.dtype, torch.Generator().manual_seed(0)
    vectors = torch.randn(b, n // b, _CHEAP_PROBES, dtype=dtype, generator=generator) / _CHEAP_PROBES**0.5
    found = torch.stack([image(parts, weights, vectors) for parts, weights in sums])
    coefficients = torch.tensor([list(row) for row in combinations], dtype=dtype)
    norms: list[float] = torch.einsum("cf,fips->cips", coefficients, found).flatten(1).double().norm(dim=1).tolist()
    return norms


def image(parts: Sequence[BlockFactors], weights: Sequence[float], vectors: Tensor) -> Tensor:
    """`Σ_k w_k delta_W^k x` for vectors `x` as `[b, n/b, s]`: `[b, m/b, s]` in their dtype."""
    b, q, s = vectors.shape
    rows = vectors.mT.contiguous()
    total = vectors.new_zeros(b, parts[0].shape[0] // b, s)
    for f, weight in zip(parts, weights, strict=True):
        right = rows @ f.A.to(vectors.dtype).reshape(f.rank, b, q).permute(1, 2, 0)
        mixed = torch.einsum("ijr,jsr->irs", f.sigma.to(vectors.dtype) * (weight * f.scaling), right)
        total.baddbmm_(f.B.to(vectors.dtype).reshape(b, -1, f.rank), mixed)
    return total


def _squares_of_blocks(factors: Sequence[BlockFactors], weights: Tensor, probes: int) -> Tensor:
    """Squared norms of combinations, `[C]`, block row by block row; of the action on `probes` random vectors if not 0.

    With `x` standard normal, the mean of `‖M x‖²` is `‖M‖²`.
    """
    squares = torch.zeros(len(weights), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    pieces = [blocked(f) for f in factors]
    b, q, _ = pieces[0][2].shape
    # What multiplies the stack from the right: the columns of every block, or their images of the same random vectors.
    vectors = torch.randn(b, q, probes, dtype=torch.float64, generator=generator) / max(probes, 1) ** 0.5
    rights = [right.mT @ vectors if probes else right.mT for _, _, right in pieces]
    for i in range(b):
        if probes:  # Σ_j M_ij x_j, for every factor
            rows = [
                left[i] @ torch.einsum("jr,jrs->rs", sigma[i], right)
                for (left, sigma, _), right in zip(pieces, rights, strict=True)
            ]
            squares += torch.einsum("cf,fps->cps", weights, torch.stack(rows)).square().sum((1, 2))
            continue
        for j in range(b):
            blocks = [
                (left[i] * sigma[i, j]) @ right[j] for (left, sigma, _), right in zip(pieces, rights, strict=True)
            ]
            squares += torch.einsum("cf,fpq->cpq", weights, torch.stack(blocks)).square().sum((1, 2))
    return squares


def squared_distances(gram: Tensor) -> Tensor:
    """`‖d_k − d_l‖²` from the Gram matrix, never negative."""
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2 * gram).clamp_min(0.0)


def _gram(tensors: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([t.double().flatten() for t in tensors])
    return rows @ rows.T
