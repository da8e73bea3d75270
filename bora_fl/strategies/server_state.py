"""What a strategy knows between rounds, and its form as named tensors for a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors
from bora_fl.privacy.central import PrivacyState
from bora_fl.state import AdapterState, flatten, flatten_factors, unflatten, unflatten_factors
from bora_fl.strategies.best import Best
from bora_fl.strategies.server_optimizers import OptimizerState

_CURRENT, _CARRIED, _VELOCITY = "current/", "carried/", "velocity/"
_RANK, _OPTIMIZER, _PRIVACY = "memory/rank/", "memory/", "memory/privacy/"
_BEST, _SHARES = "best/", "memory/class-shares"


@dataclass(frozen=True)
class ServerState:
    """Everything a strategy knows between rounds.

    Attributes:
        current: What clients receive next.
        ranks: Layer to the global adapter's rank, which a strategy may leave for a while.
        carried: Layer to the residual kept on the server.
        velocity: Layer to the product's velocity (``strategy.product-momentum``).
        fold: Layer to the base delta of this version, which clients add to their frozen weights before they train on
            `current`.
        fold_version: Increases by one with each non-empty base delta.
        optimizer: The server optimizer's moments.
        class_shares: Each class's share of all clients' examples, from the head's sums; empty where it is not known.
        best: The adapter of least held-out loss so far, where the run keeps it.
        privacy: What client-level privacy has spent; None before its first round and without it.
    """

    current: AdapterState
    ranks: Mapping[str, int] = field(default_factory=dict)
    carried: Mapping[str, BlockFactors] = field(default_factory=dict)
    velocity: Mapping[str, BlockFactors] = field(default_factory=dict)
    fold: Mapping[str, BlockFactors] = field(default_factory=dict)
    fold_version: int = 0
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    class_shares: tuple[float, ...] = ()
    best: Best | None = None
    privacy: PrivacyState | None = None

    @classmethod
    def start(cls, initial: AdapterState) -> "ServerState":
        """The state before round 1; it remembers the rank of every layer."""
        return cls(initial, {name: factors.rank for name, factors in initial.layers.items()})

    @property
    def ending(self) -> AdapterState:
        """What the run would end with now: the best adapter, if it stands on the frozen weights as they are."""
        best = self.best
        return best.adapter if best and best.fold_version == self.fold_version else self.current

    def back_to(self, adapter: AdapterState) -> "ServerState":
        """An earlier round's adapter; what the server kept of the rounds since does not belong to it."""
        return replace(self, current=adapter, carried={}, velocity={}, optimizer=OptimizerState())

    def rank(self, layer: str) -> int:
        """The global adapter's rank in a layer."""
        return self.ranks.get(layer, self.current.layers[layer].rank)

    def to_tensors(self) -> dict[str, Tensor]:
        """The state without its base delta, of which a run keeps every version.

        Returns:
            `current/…`, `carried/…`, `velocity/…` and `best/…` as in `bora_fl.state`, and under `memory/`:
            `rank/<layer>`, `first/<coordinate>` and `second/<coordinate>` (the moments), `class-shares`, `privacy/…`.
        """
        tensors = {f"{_CURRENT}{name}": tensor for name, tensor in flatten(self.current).items()}
        tensors |= flatten_factors(self.carried, _CARRIED) | flatten_factors(self.velocity, _VELOCITY)
        tensors |= {f"{_RANK}{name}": torch.tensor(rank) for name, rank in self.ranks.items()}
        tensors |= {f"{_OPTIMIZER}{name}": tensor for name, tensor in self.optimizer.to_tensors().items()}
        if self.class_shares:
            tensors[_SHARES] = torch.tensor(self.class_shares, dtype=torch.float64)
        if self.best:
            tensors |= {f"{_BEST}{name}": tensor for name, tensor in self.best.to_tensors().items()}
        spent = self.privacy.to_tensors() if self.privacy else {}
        return tensors | {f"{_PRIVACY}{name}": tensor for name, tensor in spent.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], fold_version: int) -> "ServerState":
        """The inverse of `to_tensors`.

        Raises:
            ValueError: If a part is missing or unknown.
        """
        spent, best = _under(_PRIVACY, tensors), _under(_BEST, tensors)
        return cls(
            unflatten(_under(_CURRENT, tensors)),
            {name: int(rank) for name, rank in _under(_RANK, tensors).items()},
            unflatten_factors(tensors, _CARRIED),
            unflatten_factors(tensors, _VELOCITY),
            fold_version=fold_version,
            optimizer=OptimizerState.from_tensors(_under(_OPTIMIZER, tensors)),
            class_shares=tuple(tensors[_SHARES].tolist()) if _SHARES in tensors else (),
            best=Best.from_tensors(best) if best else None,
            privacy=PrivacyState.from_tensors(spent) if spent else None,
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
