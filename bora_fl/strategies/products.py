"""Inner products and distances of whole clients' updates, in factored form.

A client's update is the change of every layer's product and of every other trained tensor. All pairs are had from one
Gram matrix, computed from the small Gram matrices of the factors; nothing of a weight's size is formed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors, merge
from bora_fl.blocks.factors import blocked
from bora_fl.state import AdapterState
from bora_fl.strategies.layer_merge import ALL, Trains

_GROUP_RANK = 512  # components taken at a time


def gram_of_changes(states: Sequence[AdapterState], reference: AdapterState, shares: Trains = ALL) -> Tensor:
    """`G[k, l] = <d_k, d_l>` with `d_k` the k-th state's change against the reference.

    Args:
        states: K clients' states, of any ranks. reference: What they were sent. shares: The parts that leave the
        clients. Where B is not among them there is no product to compare, and a layer's
            change is that of A.

    Returns:
        `[K, K]`, float64, symmetric.
    """
    everyone = [*states, reference]
    gram = torch.zeros(len(everyone), len(everyone), dtype=torch.float64)
    for layer in reference.layers:
        factors = [state.layers[layer] for state in everyone]
        gram += gram_of_products(factors) if "B" in shares else _gram([f.A for f in factors])
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
        The norms, all from one Gram matrix while the components are few; else each from QR factorizations, whose cost
        grows with the number of components and not with its square.
    """
    first = factors[0]
    if sum(f.rank for f in factors) > max(first.shape) // first.num_blocks:
        return [merge(factors, weights).norm() for weights in combinations]
    gram = gram_of_products(factors)
    weights = torch.tensor([list(row) for row in combinations], dtype=torch.float64)
    squares = torch.einsum("ck,kl,cl->c", weights, gram, weights).clamp_min(0.0)
    norms: list[float] = squares.sqrt().tolist()
    return norms


def squared_distances(gram: Tensor) -> Tensor:
    """`‖d_k − d_l‖²` from the Gram matrix, never negative."""
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2 * gram).clamp_min(0.0)


def _gram(tensors: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([t.double().flatten() for t in tensors])
    return rows @ rows.T
