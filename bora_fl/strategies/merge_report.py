"""What a round's report says of its merge: norms over all layers, at a small share of the merge's own cost."""

import math
from collections.abc import Sequence

from bora_fl.blocks import effective_rank
from bora_fl.state import AdapterState
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.products import cheap_sizes

_NORMS = ("update_norm", "fold_norm", "carried_norm")
_MOST_LAYERS = 24


def measured(layers: Sequence[str]) -> list[str]:
    """The layers that are measured: all, or of many every so-manieth."""
    return list(layers[:: max(1, len(layers) // _MOST_LAYERS)])


def squares(layer: LayerRound, result: LayerMerge) -> dict[str, float]:
    """Squared norms of one layer: of the target and what the result misses of it, and of what is reported as it is.

    Args:
        layer: What was merged.
        result: What it was merged to.
    """
    kept = {"current": result.current, "carried_norm": result.carried, "fold_norm": result.fold}
    parts = {part: factors for part, factors in kept.items() if factors is not None}
    none = [0.0] * len(parts)
    combinations = {
        "target": [1.0, 0.0, *none],
        "update_norm": [1.0, -1.0, *none],
        "error": [1.0, 0.0, *[-1.0] * len(parts)],
    }
    for part in parts.keys() & set(_NORMS):
        combinations[part] = [0.0, 0.0, *[float(part == other) for other in parts]]
    sums = [layer.next_parts(), *(([factors], [1.0]) for factors in (layer.current, *parts.values()))]
    norms = cheap_sizes(sums, list(combinations.values()))
    return {quantity: norm**2 for quantity, norm in zip(combinations, norms, strict=True)}


def report(layers: Sequence[dict[str, float]], ranks: Sequence[int]) -> dict[str, float]:
    """`update_norm`, `fold_norm`, `carried_norm`, `merge_error` and `rank` of all layers.

    Args:
        layers: The `squares` of the layers that are measured; they stand for the others.
        ranks: The rank of each layer's result.
    """
    share = len(layers) / max(len(ranks), 1)
    total = {name: math.fsum(layer.get(name, 0.0) for layer in layers) for name in ("error", "target", *_NORMS)}
    found = {name: math.sqrt(total[name] / share) if share else 0.0 for name in _NORMS}
    found["merge_error"] = math.sqrt(total["error"] / total["target"]) if total["target"] > 0 else 0.0
    if ranks:
        found["rank"] = sum(ranks) / len(ranks)
    return found


def mean_effective_rank(state: AdapterState) -> float | None:
    """Mean `effective_rank` over the layers that are measured; None without factors, or if all updates vanish."""
    ranks = [effective_rank(state.layers[name]) for name in measured(list(state.layers))]
    return sum(ranks) / len(ranks) if any(ranks) else None
