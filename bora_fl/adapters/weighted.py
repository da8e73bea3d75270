"""A new adapter from a weighted sum of others: `Σ_k w_k delta_W^k`, exactly or at a chosen rank.

Stacking the factors along the rank, with the weights inside Sigma, is the sum itself (`bora_fl.blocks.merge`); the best
factors of a lower rank are `bora_fl.blocks.refactorize`'s. Both keep the blocks, which PEFT's SVD of the dense sum to
rank r would give up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bora_fl.blocks import BlockFactors, merge, refactorize

from .config import BoraConfig

COMBINATIONS = ("refactorize", "cat")


def weighted_factors(
    layers: Mapping[str, Mapping[str, BlockFactors]], weights: Mapping[str, float], combination: str, rank: int | None
) -> dict[str, BlockFactors]:
    """Return each layer's factors of `Σ_k w_k delta_W^k`, over the adapters that the layer has.

    Args:
        layers: For each adapter its factors by layer, all of one block count.
        weights: By adapter; negative ones subtract.
        combination: `"cat"` stacks, so that ranks add up; `"refactorize"` fits.
        rank: Of the fit; by default the largest of a layer's adapters.
    """
    found: dict[str, BlockFactors] = {}
    for layer in dict.fromkeys(name for factors in layers.values() for name in factors):
        holders = [adapter for adapter in weights if layer in layers[adapter]]
        parts = [layers[adapter][layer] for adapter in holders]
        stack = merge(parts, [weights[adapter] for adapter in holders])
        fitted = max(part.rank for part in parts) if rank is None else rank
        found[layer] = stack if combination == "cat" else refactorize(stack, fitted).factors
    return found


def check_request(
    configs: Mapping[str, BoraConfig], adapters: Sequence[str], weights: Sequence[float], combination_type: str
) -> None:
    """Raise a ValueError that says what of a weighted sum's arguments is wrong."""
    unknown = [name for name in adapters if name not in configs]
    if unknown or not adapters:
        raise ValueError(f"adapters={list(adapters)}: {unknown or 'none'} of {list(configs)}; name adapters that exist")
    if len(weights) != len(adapters) or len(set(adapters)) != len(adapters):
        raise ValueError(f"{len(weights)} weights for adapters={list(adapters)}; give one weight for each, named once")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type={combination_type!r} is unknown; use one of {', '.join(COMBINATIONS)}")
    blocks = {name: configs[name].num_blocks for name in adapters}
    if len(set(blocks.values())) > 1:
        raise ValueError(f"the adapters have different num_blocks ({blocks}); only equal ones add up to a BoRA adapter")
    beside = [name for name in adapters if configs[name].modules_to_save or configs[name].bias != "none"]
    if beside:
        raise ValueError(f"adapters {beside} train modules or biases beside their factors, which a sum leaves out")
