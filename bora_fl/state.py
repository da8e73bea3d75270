"""What a federation trains and sends: the block factors of every adapted layer and whatever else is trained beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bora_fl.blocks import BlockFactors


@dataclass(frozen=True)
class AdapterState:
    """The trained state of a model, in the form in which it is merged.

    Attributes:
        layers: Layer name to its factors with the effective Sigma. Plain LoRA is one block with Sigma = 1.
        tensors: Name to any other trained tensor: a classification head, biases, norms, another PEFT method's state.
    """

    layers: Mapping[str, BlockFactors] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def num_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        parts = [part for f in self.layers.values() for part in (f.B, f.sigma, f.A)]
        return sum(t.numel() * t.element_size() for t in [*parts, *self.tensors.values()])


@dataclass(frozen=True)
class ClientUpdate:
    """One client's accepted reply.

    Attributes:
        client: The client's stable id (partition id in a simulation, else the node id).
        weight: Its share before normalization: positive and finite.
        state: What it trained, in full (factors the strategy froze are as they were sent).
    """

    client: int
    weight: float
    state: AdapterState
