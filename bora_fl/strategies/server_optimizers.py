"""Server optimizers: a step along the round's change instead of the change itself.

With `Δ = merged − current` in the coordinates of `coordinates.py`, restricted to what was trained this round:

- momentum (FedAvgM; Hsu et al., arXiv:1909.06335): `v ← β₁ v + Δ`, `x ← x + η v`
- adam (FedAdam; Reddi et al., ICLR 2021, arXiv:2003.00295): `v ← β₁ v + (1 − β₁) Δ`, `u ← β₂ u + (1 − β₂) Δ²`,
  `x ← x + η v / (√u + τ)`
- yogi (FedYogi; ibid.): as adam with `u ← u − (1 − β₂) Δ² sign(u − Δ²)`

Strategies that refactorize give factors in coordinates of their own every round; these are first aligned to the
received ones, so that the difference is one of updates and not of how they are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bora_fl.config import StrategySettings
from bora_fl.state import AdapterState
from bora_fl.strategies.alignment import in_gauge_of
from bora_fl.strategies.coordinates import from_coordinates, to_coordinates
from bora_fl.strategies.layer_merge import Trains


@dataclass(frozen=True)
class OptimizerState:
    """The moments of a server optimizer, by coordinate; missing ones are zero.

    Attributes:
        first: v.
        second: u, of adam and yogi.
    """

    first: Mapping[str, Tensor] = field(default_factory=dict)
    second: Mapping[str, Tensor] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        """`first/<coordinate>` and `second/<coordinate>`."""
        first = {f"first/{name}": tensor for name, tensor in self.first.items()}
        return first | {f"second/{name}": tensor for name, tensor in self.second.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "OptimizerState":
        """The inverse of `to_tensors`; other names are left out."""
        found: dict[str, dict[str, Tensor]] = {"first": {}, "second": {}}
        for name, tensor in tensors.items():
            moment, _, coordinate = name.partition("/")
            if moment in found:
                found[moment][coordinate] = tensor
        return cls(**found)


def server_step(
    merged: AdapterState,
    current: AdapterState,
    state: OptimizerState,
    settings: StrategySettings,
    sigma_transform: str,
    trains: Trains,
) -> tuple[AdapterState, OptimizerState]:
    """One step of the configured server optimizer.

    Args:
        merged: The strategy's result.
        current: What the clients were sent.
        state: The moments so far.
        settings: The optimizer and its step, β₁, β₂ and τ.
        sigma_transform: `"exp_norm"` or `"identity"`.
        trains: The parts trained this round; others keep the merged value, and their moments wait.

    Returns:
        The state to send next, its Sigma not normalized, and the moments moved on.
    """
    if {"A", "B", "sigma"} <= trains:
        aligned = {name: in_gauge_of(factors, current.layers[name]) for name, factors in merged.layers.items()}
        merged = AdapterState(aligned, merged.tensors)
    before = to_coordinates(current, sigma_transform, trains)
    after = to_coordinates(merged, sigma_transform, trains)
    moved, firsts, seconds = {}, dict(state.first), dict(state.second)
    for name, start in before.items():
        change = after[name] - start
        first, second = (moments.get(name, torch.zeros_like(change)) for moments in (firsts, seconds))
        step, firsts[name], seconds[name] = moments_step(change, first, second, settings)
        moved[name] = start + settings.server_learning_rate * step
    after_step = OptimizerState(firsts, {} if settings.server_optimizer == "momentum" else seconds)
    return from_coordinates(moved, merged, sigma_transform), after_step


def moments_step(
    change: Tensor, first: Tensor, second: Tensor, settings: StrategySettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Direction of the step and the new first and second moments, elementwise; `second` is unused by momentum."""
    if settings.server_optimizer == "momentum":
        first = settings.server_momentum * first + change
        return first, first, second
    first = settings.server_momentum * first + (1 - settings.server_momentum) * change
    square = change.square()
    if settings.server_optimizer == "adam":
        second = settings.server_beta2 * second + (1 - settings.server_beta2) * square
    else:
        second = second - (1 - settings.server_beta2) * square * torch.sign(second - square)
    return first / (second.sqrt() + settings.server_epsilon), first, second
