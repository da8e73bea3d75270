"""One stated gauge for block factors.

For any `α [b, r]`, `β [b, r]` without zeros, the factors `B_i[:, k] α_ik`, `A_j[k, :] β_jk`,
`Sigma[i, j, k] / (α_ik β_jk)` and any common permutation of `k` are the same update.
"""

from __future__ import annotations

import torch

from bora_fl.blocks.factors import BlockFactors


def truncate(factors: BlockFactors, rank: int) -> BlockFactors:
    """Keep the `rank` components of most energy, most energetic first.

    Args:
        factors: Any block factors.
        rank: Between 1 and `factors.rank`.

    Raises:
        ValueError: If the rank is out of that range.
    """
    if not 1 <= rank <= factors.rank:
        raise ValueError(f"rank is {rank}; choose one between 1 and {factors.rank}, the rank of the factors")
    keep = torch.argsort(factors.component_energy(), descending=True, stable=True)[:rank]
    return BlockFactors(factors.B[:, keep], factors.sigma[..., keep], factors.A[keep], factors.scaling)
