"""The frozen weight under an adapted layer: how it lies in memory, adding a delta to it, saving and restoring it.

Works for every PEFT layer over an `nn.Linear`, transformers' `Conv1D`, or a quantized linear layer whose backend can
write weights. A delta is always `[m, n]` = `[out_features, in_features]`; only this module knows the stored layout.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_transposed(layer: BaseTunerLayer) -> bool:
    """Whether the base weight lies as `[n, m]`."""
    return isinstance(layer.get_base_layer(), Conv1D)


def as_stored(layer: BaseTunerLayer, delta: Tensor) -> Tensor:
    """Return a delta `[m, n]` in the layout of the layer's base weight."""
    return delta.T if is_transposed(layer) else delta


@torch.no_grad()
def add_to_base(layer: BaseTunerLayer, delta: Tensor, *, finite: bool = False) -> None:
    """Add a delta to a layer's base weight.

    The sum is taken in the wider of both dtypes and rounded once, to the weight's dtype. A quantized weight is
    dequantized and quantized again.

    Args:
        layer: A PEFT layer of any method.
        delta: `[m, n]`, any floating dtype, on any device.
        finite: Refuse a sum that is not finite.

    Raises:
        TypeError: The weight cannot be written: quantized by a backend that only runs forward, or offloaded.
        ValueError: The delta's shape does not fit, or the sum is not finite and has to be. The weight is as it was.
    """
    base, backend = layer.get_base_layer(), _backend(layer)
    if backend is not None and not backend.supports_merge:
        raise TypeError(
            f"the base weight is quantized by {backend.backend_name}, which cannot write weights, so nothing can be "
            "added to it; use a base that is not quantized, or one by bitsandbytes, torchao or HQQ"
        )
    weight = base.weight if backend is None else backend.get_base_weight(base)
    if weight.is_meta:
        raise TypeError(
            "the base weight is offloaded, so nothing can be added to it; load the model without offloading"
        )
    delta = as_stored(layer, delta)
    if delta.shape != weight.shape:
        raise ValueError(f"a delta lies as {list(delta.shape)} where the base weight lies as {list(weight.shape)}")
    if hasattr(weight, "placements"):  # each process has the whole delta, and a part of the weight
        from torch.distributed.tensor import distribute_tensor

        delta = distribute_tensor(delta.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    total = (weight + delta.to(weight.device)).to(weight.dtype)
    if finite and not bool(torch.isfinite(total).all()):
        raise ValueError("NaNs detected in the merged weights")
    if backend is None:
        weight.copy_(total)
    else:
        backend.set_base_weight(layer, total)


def untie(model: Any) -> None:
    """Give an adapted layer whose weight is another module's too a weight of its own, equal to it.

    So it is with an output layer and the embedding: what is added to the one would be added to the other. Where there
    are such, the model's config says that they are no longer tied.

    Args:
        model: A model with adapters.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base: Any = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if isinstance(weight, nn.Parameter) and owners[id(weight)] > 1:
            owners[id(weight)] -= 1
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            model.config.tie_word_embeddings = False


def save_base(layer: BaseTunerLayer) -> Tensor | nn.Module:
    """Return a copy of what `add_to_base` changes, for `restore_base`: the weight, or the whole quantized layer."""
    base: nn.Module = layer.get_base_layer()
    weight: Any = base.weight
    return weight.detach().clone() if _backend(layer) is None else copy.deepcopy(base)


@torch.no_grad()
def restore_base(layer: BaseTunerLayer, saved: Tensor | nn.Module) -> None:
    """Put back, bit by bit, what `save_base` returned for this layer."""
    if isinstance(saved, Tensor):
        layer.get_base_layer().weight.copy_(saved)
        return
    parent: Any = layer
    while hasattr(parent.base_layer, "base_layer"):
        parent = parent.base_layer
    parent.base_layer = copy.deepcopy(saved)  # a backend may change it in place, and it may be wanted again


def _backend(layer: Any) -> Any:
    """The layer's quantization backend, or None; PEFT's layers of some methods, LoRA's among them, do not keep it."""
    known = {"get_apply_tensor_subclass": getattr(layer, "get_apply_tensor_subclass", None)}
    return layer.quantization_backend or resolve_quantization_backend(layer.get_base_layer(), **known)
