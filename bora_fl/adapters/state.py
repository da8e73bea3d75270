"""Reading all adapted layers of a model as block factors, and writing them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from bora_fl.blocks import BlockFactors

from .layer import BoraLayer
from .sigma import to_raw


def named_layers(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, BoraLayer]]:
    """Yield the layers that hold the named adapter, in module order, under their names in the base model.

    Args:
        model: A `PeftModel`, a tuner, or a model into which adapters were injected.
        adapter_name: Name of the adapter.
    """
    root: Any = model.base_model if isinstance(model, PeftModel) else model
    root = root.model if isinstance(root, BaseTuner) else root
    for name, module in root.named_modules():
        if isinstance(module, BoraLayer) and adapter_name in module.bora_adapter:
            yield name, module


def read_factors(model: nn.Module, adapter_name: str = "default") -> dict[str, BlockFactors]:
    """Return a copy of every adapted layer's factors, by the layer's name in the base model.

    Args:
        model: A model with BoRA adapters.
        adapter_name: Name of the adapter.

    Returns:
        Factors with the effective Sigma, detached, in the adapter's dtype and on its device.

    Raises:
        ValueError: The model has no such adapter.
    """
    return read_layers(_layers_by_name(model, adapter_name), adapter_name)


def read_layers(layers: Mapping[str, BoraLayer], adapter_name: str = "default") -> dict[str, BlockFactors]:
    """Return a copy of the factors of layers that are at hand already, by the names they are given under."""
    return {name: _copy(layer, adapter_name) for name, layer in layers.items()}


def write_factors(model: nn.Module, factors: Mapping[str, BlockFactors], adapter_name: str = "default") -> None:
    """Write factors into the adapters in place, so that every layer's update becomes `factors[name].dense()`.

    A and B are copied as they are; sigma becomes `to_raw(Sigma)`. Where the factors' scaling differs from the layer's,
    B takes the ratio.

    Args:
        model: A model with BoRA adapters.
        factors: Factors of every adapted layer, as `read_factors` names them, of the layers' own shapes.
        adapter_name: Name of the adapter.

    Raises:
        ValueError: Layers are missing or unknown, a shape differs, or a Sigma is outside its transform's range. The
            adapters are then as they were.
    """
    write_layers(_layers_by_name(model, adapter_name), factors, adapter_name)


@torch.no_grad()
def write_layers(
    layers: Mapping[str, BoraLayer], factors: Mapping[str, BlockFactors], adapter_name: str = "default"
) -> None:
    """Write factors into layers that are at hand already, as `write_factors` does."""
    missing, unknown = sorted(layers.keys() - factors.keys()), sorted(factors.keys() - layers.keys())
    if missing or unknown:
        raise ValueError(
            f"The factors do not name the layers of adapter {adapter_name!r}: missing {missing}, unknown {unknown}; "
            "pass one entry for each layer that read_factors returns."
        )
    updates: list[tuple[Tensor, Tensor]] = []
    for name, layer in layers.items():
        adapter, new = layer.adapter(adapter_name), factors[name]
        for part in ("B", "sigma", "A"):
            shape, expected = list(getattr(new, part).shape), list(getattr(adapter, part).shape)
            if shape != expected:
                raise ValueError(
                    f"Layer {name!r}: {part} has shape {shape} where the adapter has {expected}; bring the factors to "
                    "the adapter's rank and blocks first."
                )
        try:
            sigma = to_raw(new.sigma, adapter.sigma_transform)
        except ValueError as error:
            raise ValueError(f"Layer {name!r}: {error}") from error
        B = new.B if new.scaling == adapter.scaling else new.B * (new.scaling / adapter.scaling)
        updates += [(adapter.B, B), (adapter.sigma, sigma), (adapter.A, new.A)]
    for parameter, value in updates:
        parameter.copy_(value)


def _layers_by_name(model: nn.Module, adapter_name: str) -> dict[str, BoraLayer]:
    layers = dict(named_layers(model, adapter_name))
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no BoRA layer with an adapter of this name.")
    return layers


def _copy(layer: BoraLayer, adapter_name: str) -> BlockFactors:
    factors = layer.adapter(adapter_name).factors()
    return BlockFactors(B=factors.B.clone(), sigma=factors.sigma.clone(), A=factors.A.clone(), scaling=factors.scaling)
