"""Robust rules: what is merged when some clients may be faulty or hostile.

A rule turns the round's updates into fewer or shorter ones before the strategy merges them. Krum, Multi-Krum and norm
clipping look at the distances of the clients' *products* (and other trained tensors), so that two factorizations of
one update are one update. The coordinate median and the trimmed mean need coordinates: they take the factors, written
in the coordinates of what was sent (`alignment.align`), since the entries of a product cannot be visited without
forming it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bora_fl.blocks import at_rank
from bora_fl.state import ALL, AdapterState, ClientUpdate
from bora_fl.strategies.alignment import align
from bora_fl.strategies.coordinates import from_coordinates, to_coordinates
from bora_fl.strategies.layer_merge import Trains
from bora_fl.strategies.products import gram_of_changes, squared_distances


@dataclass(frozen=True)
class RobustRound:
    """A round's updates, as a rule sees them.

    Attributes:
        updates: At least one, in the order of the clients' ids.
        current: What the clients were sent.
        byzantine: How many clients are assumed bad.
        trains: The parts trained this round.
        shares: The parts that leave the clients.
        sigma_transform: `"exp_norm"` or `"identity"`.
    """

    updates: Sequence[ClientUpdate]
    current: AdapterState
    byzantine: int = 1
    trains: Trains = ALL
    shares: Trains = ALL
    sigma_transform: str = "exp_norm"

    def gram(self) -> Tensor:
        """Inner products of the clients' changes, `[K, K]`."""
        return gram_of_changes([update.state for update in self.updates], self.current, self.shares)


_SHORTER = 0.01  # a clipped update may end this much below the bound, in logarithms of its norm
_MOST_TRIALS = 60

RobustRule = Callable[[RobustRound], list[ClientUpdate]]


def krum(robust: RobustRound) -> list[ClientUpdate]:
    """The update whose nearest `K − f − 2` others are nearest (Blanchard et al., NeurIPS 2017, arXiv:1703.02757)."""
    return [robust.updates[int(krum_scores(robust).argmin())]]


def multi_krum(robust: RobustRound) -> list[ClientUpdate]:
    """The `K − f` updates with the best Krum scores, to be merged as usual (Blanchard et al., NeurIPS 2017)."""
    keep = max(len(robust.updates) - robust.byzantine, 1)
    best = torch.argsort(krum_scores(robust), stable=True)[:keep]
    return [robust.updates[k] for k in sorted(best.tolist())]


def krum_scores(robust: RobustRound) -> Tensor:
    """Sum of the squared distances to the nearest `max(K − f − 2, 1)` other updates, `[K]`."""
    count = len(robust.updates)
    distances = squared_distances(robust.gram())
    nearest = min(max(count - robust.byzantine - 2, 1), count - 1)
    return distances.sort(dim=1).values[:, 1 : 1 + nearest].sum(1)


def norm_clip(robust: RobustRound) -> list[ClientUpdate]:
    """Shorten every update that moved further than the median one to that length (Sun et al., arXiv:1911.07963).

    An update is shortened along the straight line from what was sent, in its factors: exact where one factor trains,
    and searched for where several do, until the product's change is within 1 % of the bound.
    """
    norms = robust.gram().diagonal().clamp_min(0).sqrt()
    bound = float(norms.quantile(0.5))
    return [
        update if float(norm) <= bound * (1 + 1e-9) else _shortened(update, robust, bound)
        for update, norm in zip(robust.updates, norms, strict=True)
    ]


def _shortened(update: ClientUpdate, robust: RobustRound, bound: float) -> ClientUpdate:
    parts = robust.trains & robust.shares
    layers = {
        name: at_rank(factors, update.state.layers[name].rank, robust.sigma_transform)
        for name, factors in robust.current.layers.items()
    }
    start = AdapterState(layers, robust.current.tensors)
    before = to_coordinates(start, robust.sigma_transform, parts)
    after = to_coordinates(update.state, robust.sigma_transform, parts)

    def moved(share: float) -> tuple[AdapterState, float]:
        line = {name: before[name] + share * (after[name] - before[name]) for name in before}
        state = from_coordinates(line, update.state, robust.sigma_transform)
        return state, math.sqrt(max(float(gram_of_changes([state], robust.current, robust.shares)), 0.0))

    # The norm grows like a power of the share: a secant in logarithms, kept between a share that is too short and one
    # that is too long.
    state, low, high = moved(0.0)[0], 0.0, 1.0
    if bound == 0:  # most clients changed nothing
        return replace(update, state=state)
    last, power = math.log(moved(1.0)[1] / bound), 1.0
    guess = math.exp(-last)
    for _ in range(_MOST_TRIALS):
        candidate, norm = moved(guess)
        excess = math.log(max(norm / bound, 1e-300))
        if excess > 0:
            high = guess
        else:
            state, low = candidate, guess
            if excess > -_SHORTER:
                break
        power = max((last - excess) / math.log(1.0 / guess), 0.5) if guess < 1 else power
        step = guess * math.exp((-_SHORTER / 2 - excess) / power)
        guess = step if low < step < high else (math.sqrt(low * high) if low > 0 else high / 4)
    return replace(update, state=state)


def median(robust: RobustRound) -> list[ClientUpdate]:
    """Weighted coordinate-wise median of the factors (Yin et al., ICML 2018, arXiv:1803.01498)."""
    weights = torch.tensor([update.weight for update in robust.updates], dtype=torch.float64)
    return _combined(robust, lambda stack: weighted_median(stack, weights))


def trimmed_mean(robust: RobustRound) -> list[ClientUpdate]:
    """Weighted mean of each coordinate without its f largest and f smallest values (Yin et al., ICML 2018)."""
    weights = torch.tensor([update.weight for update in robust.updates], dtype=torch.float64)
    trim = min(robust.byzantine, (len(robust.updates) - 1) // 2)
    return _combined(robust, lambda stack: weighted_trimmed_mean(stack, weights, trim))


def weighted_median(stack: Tensor, weights: Tensor) -> Tensor:
    """`[K, …]`, `[K]` -> `[…]`: the value with half the weight on either side, the middle where two qualify."""
    values, order = stack.sort(dim=0)
    below = weights[order].cumsum(0) / weights.sum()
    lower = (below >= 0.5 - 1e-12).int().argmax(0, keepdim=True)
    upper = (below > 0.5 + 1e-12).int().argmax(0, keepdim=True)
    return (values.gather(0, lower) + values.gather(0, upper))[0] / 2


def weighted_trimmed_mean(stack: Tensor, weights: Tensor, trim: int) -> Tensor:
    """`[K, …]`, `[K]` -> `[…]`: drop the `trim` largest and smallest values of each coordinate, average the rest."""
    values, order = stack.sort(dim=0)
    kept = slice(trim, stack.shape[0] - trim)
    share = weights[order][kept]
    return (values[kept] * share).sum(0) / share.sum(0)


def _combined(robust: RobustRound, combine: Callable[[Tensor], Tensor]) -> list[ClientUpdate]:
    parts = robust.trains & robust.shares
    free = {"A", "B", "sigma"} <= parts  # a frozen factor leaves no freedom to align
    states = [_aligned(update.state, robust.current) if free else update.state for update in robust.updates]
    flats = [to_coordinates(state, robust.sigma_transform, parts) for state in states]
    merged = {name: combine(torch.stack([flat[name] for flat in flats])) for name in flats[0]}
    like = AdapterState(robust.current.layers, states[0].tensors)
    total = sum(update.weight for update in robust.updates)
    return [ClientUpdate(robust.updates[0].client, total, from_coordinates(merged, like, robust.sigma_transform))]


def _aligned(state: AdapterState, current: AdapterState) -> AdapterState:
    return AdapterState({name: align(f, current.layers[name]) for name, f in state.layers.items()}, state.tensors)


RULES: dict[str, RobustRule] = {
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "norm-clip": norm_clip,
}
COORDINATE_RULES = frozenset({"median", "trimmed-mean"})
WHOLE_RULES = COORDINATE_RULES | {"norm-clip"}
"""The rules that make new updates of the clients' whole ones, and so have all of them in memory."""
