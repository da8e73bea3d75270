"""An adapter state as named tensors in which averages, medians and optimizer steps make sense.

These are the entries of B, A and the other trained tensors, and for Sigma its logarithm under `exp_norm` (so that every
step leaves it positive) or Sigma itself under `identity`.
"""

from collections.abc import Mapping

from torch import Tensor

from bora_fl.blocks import BlockFactors
from bora_fl.state import AdapterState
from bora_fl.strategies.layer_merge import Trains


def to_coordinates(state: AdapterState, sigma_transform: str, parts: Trains) -> dict[str, Tensor]:
    """The given parts of a state: `layers/<layer>/<part>` and `tensors/<name>`, floating tensors in float64."""
    flat: dict[str, Tensor] = {}
    for layer, factors in state.layers.items():
        values = {"B": factors.B.double(), "sigma": factors.sigma.double(), "A": factors.A.double()}
        if sigma_transform == "exp_norm":
            values["sigma"] = values["sigma"].log()
        flat |= {f"layers/{layer}/{part}": value for part, value in values.items() if part in parts}
    if "tensors" in parts:
        flat |= {f"tensors/{name}": t.double() for name, t in state.tensors.items() if t.is_floating_point()}
    return flat


def from_coordinates(flat: Mapping[str, Tensor], like: AdapterState, sigma_transform: str) -> AdapterState:
    """The state with these coordinates; parts that are not among them are taken from `like`, whose dtypes stay.

    Sigma is not normalized.
    """
    layers = {}
    for layer, factors in like.layers.items():
        values = {"B": factors.B, "sigma": factors.sigma, "A": factors.A}
        for part in values:
            value = flat.get(f"layers/{layer}/{part}")
            if value is not None:
                value = value.exp() if part == "sigma" and sigma_transform == "exp_norm" else value
                values[part] = value.to(values[part].dtype)
        layers[layer] = BlockFactors(scaling=factors.scaling, **values)
    tensors = {name: flat.get(f"tensors/{name}", t).to(t.dtype) for name, t in like.tensors.items()}
    return AdapterState(layers, tensors)
