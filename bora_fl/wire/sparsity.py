"""Sparse updates: a client sends only the entries, or the components, that moved most.

Entries: top-k sparsification of the round's change, as federated sparse LoRA does (CELLM, arXiv:2407.20557). It is
applied to each tensor on its own, since B, Sigma, A and a head move on scales of their own. Components: whole ranks of
all layers compete with each other (LoRA-A², arXiv:2410.22815).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors
from bora_fl.blocks.factors import blocked
from bora_fl.state import AdapterState, flatten, unflatten

By = Literal["entries", "components"]


def sparsify(trained: AdapterState, received: AdapterState, fraction: float) -> AdapterState:
    """Undo all but the largest changes of a round, entry by entry.

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
    after, before = _checked(trained, received, fraction)
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


def keep_components(trained: AdapterState, received: AdapterState, fraction: float) -> AdapterState:
    """Undo all but the components, of all layers together, that changed the product most.

    With `P_k = s · B[:, k] diag(Sigma[.., k]) A[k]` the k-th component of a layer's product, the
    `ceil(fraction · components)` with the largest `‖P_k − P_k received‖_F` keep what was trained, all others get back
    what was received; between equal changes the first stays, layers in order of their names. Other tensors stay.

    Args:
        trained: The state after local training.
        received: The state before it, with the same layers, ranks and tensors.
        fraction: Share of all layers' components that is kept, above 0 and at most 1.

    Raises:
        ValueError: As `sparsify`.
    """
    _checked(trained, received, fraction)
    names = sorted(trained.layers)
    if fraction == 1 or not names:
        return trained
    moved = torch.cat([component_change(trained.layers[name], received.layers[name]) for name in names])
    kept = torch.zeros_like(moved, dtype=torch.bool)
    kept[torch.argsort(moved, descending=True, stable=True)[: math.ceil(fraction * len(moved))]] = True
    layers = {}
    for name, keep in zip(names, torch.split(kept, [trained.layers[name].rank for name in names]), strict=True):
        new, old = trained.layers[name], received.layers[name]
        parts = (torch.where(keep, new.B, old.B), torch.where(keep, new.sigma, old.sigma))
        layers[name] = BlockFactors(*parts, torch.where(keep[:, None], new.A, old.A), new.scaling)
    return AdapterState(layers, trained.tensors)


def component_change(new: BlockFactors, old: BlockFactors) -> Tensor:
    """Squared Frobenius norm of the change of every component's product, `[r]` in float64, without forming it."""
    (left, sigma, right), (old_left, old_sigma, old_right) = blocked(new), blocked(old)
    # P − P' = (L − L') S R + L' (S − S') R + L' S' (R − R'), whose terms are small where the change is.
    terms = (
        (left - old_left, sigma, right),
        (old_left, sigma - old_sigma, right),
        (old_left, old_sigma, right - old_right),
    )
    total = torch.zeros(new.rank, dtype=torch.float64)
    for L, S, R in terms:
        for other_L, other_S, other_R in terms:
            total += torch.einsum("ik,ijk,jk->k", (L * other_L).sum(1), S * other_S, (R * other_R).sum(1))
    return total


def _checked(
    trained: AdapterState, received: AdapterState, fraction: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both states, flattened, after the checks that `sparsify` names."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: the share of entries to keep must be above 0 and at most 1")
    after, before = flatten(trained), flatten(received)
    if after.keys() != before.keys() or any(after[name].shape != before[name].shape for name in after):
        raise ValueError(
            "trained and received hold different tensors; sparsify what was trained against what it began from"
        )
    return after, before
