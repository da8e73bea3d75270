"""Inner products and distances of whole clients' updates, in factored form.

A client's update is the change of every layer's product and of every other trained tensor. All pairs are had from one
Gram matrix, computed from the small Gram matrices of the factors; nothing of a weight's size is formed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors
from bora_fl.blocks.factors import blocked
from bora_fl.state import AdapterState
from bora_fl.strategies.layer_merge import ALL, Trains


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

    `<M^k, M^l> = Σ_ij Σ_pq Sigma^k_ijp (B^kᵀ B^l)_i,pq (A^k A^lᵀ)_j,pq Sigma^l_ijq`.
    """
    parts = [blocked(f) for f in factors]
    left, sigma, right = (torch.cat(group, dim=2) for group in zip(*parts, strict=True))
    gram_right = right.mT @ right
    total = torch.zeros(left.shape[2], left.shape[2], dtype=torch.float64)
    for i in range(left.shape[0]):
        mixed = torch.zeros_like(total)
        for j in range(right.shape[0]):
            mixed += torch.outer(sigma[i, j], sigma[i, j]) * gram_right[j]
        total += (left[i].T @ left[i]) * mixed
    owner = torch.repeat_interleave(torch.arange(len(factors)), torch.tensor([f.rank for f in factors]))
    member = torch.nn.functional.one_hot(owner, len(factors)).double()
    return member.T @ total @ member


def squared_distances(gram: Tensor) -> Tensor:
    """`‖d_k − d_l‖²` from the Gram matrix, never negative."""
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2 * gram).clamp_min(0.0)


def _gram(tensors: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([t.double().flatten() for t in tensors])
    return rows @ rows.T
