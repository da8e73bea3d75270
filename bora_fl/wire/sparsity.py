"""Sparse updates: a client sends only the entries that moved most.

Top-k sparsification of the round's change, as federated sparse LoRA does (CELLM, arXiv:2407.20557). It is applied to
each tensor on its own, since B, Sigma, A and a head move on scales of their own.
"""

import math

import torch
from torch import Tensor

from bora_fl.state import AdapterState, flatten, unflatten


def sparsify(trained: AdapterState, received: AdapterState, fraction: float) -> AdapterState:
    """Undo all but the largest changes of a round.

    In each tensor with `N` entries the `ceil(fraction · N)` entries with the largest `|trained − received|` keep their
    trained value, all others get their received value back; between equal changes the entry that comes first in memory
    stays. Every entry of the result is thus bit for bit an entry of one of the two states, and an entry that did not
    move is never counted as sent by a receiver that looks at differences.

    Args:
        trained: The state after local training.
        received: The state before it, with the same layers, ranks and tensors.
        fraction: Share of the entries of each tensor that is kept, above 0 and at most 1; 1 keeps all.

    Returns:
        A state of `trained`'s shapes and dtypes. Its Sigma is positive where both states' are, but no longer has
        `mean|log Sigma| = 1`: servers average effective values and restore the range.

    Raises:
        ValueError: If the fraction is out of range or the two states do not hold the same tensors.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: the share of entries to keep must be above 0 and at most 1")
    after, before = flatten(trained), flatten(received)
    if after.keys() != before.keys() or any(after[name].shape != before[name].shape for name in after):
        raise ValueError(
            "trained and received hold different tensors; sparsify what was trained against what it began from"
        )
    if fraction == 1:
        return trained
    return unflatten(
        {name: t if name.endswith("/scaling") else _largest(t, before[name], fraction) for name, t in after.items()}
    )


def _largest(after: Tensor, before: Tensor, fraction: float) -> Tensor:
    before = before.to(after)
    change = (after.double() - before.double()).abs().flatten()
    keep = torch.argsort(change, descending=True, stable=True)[: math.ceil(fraction * change.numel())]
    sparse = before.flatten().clone()
    sparse[keep] = after.flatten()[keep]
    return sparse.reshape(after.shape)
