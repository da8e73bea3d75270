"""The rule by which the server merges a layer."""

from bora_fl.blocks import factor_mean
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound


def halfway(layer: LayerRound) -> LayerMerge:
    """Move half of the way to the mean of the factors."""
    mean = factor_mean(layer.updates, layer.weights)
    return LayerMerge(factor_mean([layer.current, mean], [0.5, 0.5]))
