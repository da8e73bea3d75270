"""Strategies that each break a law."""

from dataclasses import replace
from itertools import count

import torch

from bora_fl.blocks import BlockFactors, factor_mean
from bora_fl.strategies.averaging import average
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.presets import Preset

_calls = count(1)


def _with(layer: LayerRound, change) -> LayerMerge:
    f = average(layer).current
    return LayerMerge(BlockFactors(change(f.B), f.sigma, f.A, f.scaling))


def halfway(layer: LayerRound) -> LayerMerge:
    """Move half of the way."""
    return LayerMerge(factor_mean([layer.current, average(layer).current], [0.5, 0.5]))


def counting(layer: LayerRound) -> LayerMerge:
    """Scale by the number of clients."""
    return _with(layer, lambda B: B * len(layer.updates))


def forgetful(layer: LayerRound) -> LayerMerge:
    """Depend on how often it was called."""
    return _with(layer, lambda B: B + 0.1 * next(_calls))


def uniform(layer: LayerRound) -> LayerMerge:
    """Ignore the weights."""
    return average(replace(layer, weights=[1 / len(layer.updates)] * len(layer.updates)))


def in_place(layer: LayerRound) -> LayerMerge:
    """Change what it was given."""
    merged = average(layer)
    for update in layer.updates:
        update.B.mul_(2)
    return merged


def wider(layer: LayerRound) -> LayerMerge:
    """Raise the rank."""
    f = average(layer).current
    sigma = torch.cat([f.sigma, f.sigma[..., :1]], -1)
    return LayerMerge(BlockFactors(torch.cat([f.B, 0 * f.B[:, :1]], 1), sigma, torch.cat([f.A, f.A[:1]]), f.scaling))


def double(layer: LayerRound) -> LayerMerge:
    """Return float64 whatever came."""
    f = average(layer).current
    return LayerMerge(BlockFactors(f.B.double(), f.sigma.double(), f.A.double(), f.scaling))


def scaling(layer: LayerRound) -> LayerMerge:
    """Prepare a round by scaling B."""
    f = layer.current
    return LayerMerge(BlockFactors(f.B * 1.1, f.sigma, f.A, f.scaling))


exact = Preset("exact", "say that it is exact", "", "", "", average, exact=True)
folding = Preset("folding", "say that it folds", "", "", "", average, folds=True)
preparing = Preset("preparing", "change the model before a round", "", "", "", average, prepare=scaling)
