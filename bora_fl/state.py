"""What a federation trains and sends: block factors of every adapted layer, and whatever is trained beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors

PARTS = ("B", "sigma", "A")
ALL = frozenset({*PARTS, "tensors"})
"""What a round may train: the factors, and other tensors such as a head."""


@dataclass(frozen=True)
class AdapterState:
    """The trained state of a model, in the form in which it is merged.

    Attributes:
        layers: Layer name to its factors with the effective Sigma. Plain LoRA is one block with Sigma = 1.
        tensors: Name to any other trained tensor: a classification head, biases, norms, another PEFT method's state.
    """

    layers: Mapping[str, BlockFactors] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def rank(self, layer: str) -> int:
        """The rank of a layer's factors."""
        return self.layers[layer].rank


@dataclass(frozen=True)
class ClientUpdate:
    """One client's accepted reply.

    Attributes:
        client: The client's stable id (partition id in a simulation, else the node id).
        weight: Its share before normalization: positive and finite.
        state: What it trained, in full (factors the strategy froze are as they were sent).
        grams: Layer to the Gram matrix of its inputs (`bora_fl.blocks.gram`), where the strategy asks for them.
    """

    client: int
    weight: float
    state: AdapterState
    grams: Mapping[str, Tensor] = field(default_factory=dict)


def flatten(state: AdapterState) -> dict[str, Tensor]:
    """The state as named tensors, for the wire and for checkpoints.

    Returns:
        ``layers/<layer>/B [m, r]``, ``…/sigma [b, b, r]``, ``…/A [r, n]``, ``…/scaling []`` (float64) for each layer
        and ``tensors/<name>`` for the rest, sorted by name.
    """
    flat = flatten_factors(state.layers, "layers/")
    flat |= {f"tensors/{name}": tensor for name, tensor in state.tensors.items()}
    return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Tensor]) -> AdapterState:
    """The inverse of `flatten`.

    Raises:
        ValueError: For a name outside both groups or a layer with a part missing.
    """
    tensors = {name.removeprefix("tensors/"): t for name, t in flat.items() if name.startswith("tensors/")}
    strange = [name for name in flat if not name.startswith(("tensors/", "layers/"))]
    if strange:
        raise ValueError(f"unknown entry {strange[0]!r} in an adapter state")
    return AdapterState(unflatten_factors(flat, "layers/"), tensors)


def flatten_factors(layers: Mapping[str, BlockFactors], prefix: str) -> dict[str, Tensor]:
    """Factors by layer as named tensors ``<prefix><layer>/<part>``."""
    flat: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        for part in PARTS:
            flat[f"{prefix}{layer}/{part}"] = getattr(factors, part)
        flat[f"{prefix}{layer}/scaling"] = torch.tensor(factors.scaling, dtype=torch.float64)
    return flat


def unflatten_factors(flat: Mapping[str, Tensor], prefix: str) -> dict[str, BlockFactors]:
    """The inverse of `flatten_factors` for the entries under `prefix`; others are left out.

    Raises:
        ValueError: If a layer lacks a part.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        if name.startswith(prefix):
            layer, _, part = name.removeprefix(prefix).rpartition("/")
            parts.setdefault(layer, {})[part] = tensor
    layers = {}
    for layer, found in sorted(parts.items()):
        if set(found) != {*PARTS, "scaling"}:
            raise ValueError(f"layer {layer!r} holds {sorted(found)}; it must hold {sorted([*PARTS, 'scaling'])}")
        layers[layer] = BlockFactors(found["B"], found["sigma"], found["A"], float(found["scaling"]))
    return layers


def flatten_deltas(layers: Mapping[str, BlockFactors]) -> dict[str, Tensor]:
    """Base deltas by layer as named tensors: the factors, or ``<layer>/dense [m, n]`` where that is smaller.

    A stack of many clients' factors holds `(m + n) R + b² R` numbers with `R = Σ_k r_k`, the weight's delta `m n`.
    """
    flat: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        m, n = factors.shape
        if sum(getattr(factors, part).numel() for part in PARTS) <= m * n:
            flat |= flatten_factors({layer: factors}, "")
        else:
            flat[f"{layer}/dense"] = factors.to(torch.promote_types(factors.B.dtype, torch.float32)).dense()
    return flat


def unflatten_deltas(flat: Mapping[str, Tensor], prefix: str = "") -> dict[str, BlockFactors | Tensor]:
    """The inverse of `flatten_deltas` for the entries under `prefix`.

    Raises:
        ValueError: If a layer lacks a part.
    """
    dense = {name for name in flat if name.startswith(prefix) and name.endswith("/dense")}
    layers: dict[str, BlockFactors | Tensor] = {**unflatten_factors({n: flat[n] for n in flat.keys() - dense}, prefix)}
    layers |= {name.removeprefix(prefix).removesuffix("/dense"): flat[name] for name in dense}
    return dict(sorted(layers.items()))
