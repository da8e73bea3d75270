"""Server optimizers: a step along the round's change instead of the change itself.

With `Δ = merged − current` in the coordinates of `coordinates.py`, restricted to what was trained this round:

- momentum (FedAvgM; Hsu et al., arXiv:1909.06335): `v ← β₁ v + Δ`, `x ← x + η v`
- adam (FedAdam; Reddi et al., ICLR 2021, arXiv:2003.00295): `v ← β₁ v + (1 − β₁) Δ`, `u ← β₂ u + (1 − β₂) Δ²`,
  `x ← x + η v / (√u + τ)`
- yogi (FedYogi; ibid.): as adam with `u ← u − (1 − β₂) Δ² sign(u − Δ²)`

Strategies that refactorize give factors in coordinates of their own every round; these are first aligned to the
received ones, so that the difference is one of updates and not of their spelling.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bora_fl.config import StrategySettings
from bora_fl.state import AdapterState
from bora_fl.strategies.alignment import in_gauge_of
from bora_fl.strategies.coordinates import from_coordinates, to_coordinates
from bora_fl.strategies.layer_merge import Trains


def server_step(
    merged: AdapterState,
    current: AdapterState,
    memory: Mapping[str, Tensor],
    settings: StrategySettings,
    sigma_transform: str,
    trains: Trains,
) -> tuple[AdapterState, dict[str, Tensor]]:
    """One step of the configured server optimizer.

    Args:
        merged: The strategy's result.
        current: What the clients were sent.
        memory: Moments under `first/<coordinate>` and `second/<coordinate>`; missing ones are zero.
        settings: The optimizer and its step, β₁, β₂ and τ.
        sigma_transform: `"exp_norm"` or `"identity"`.
        trains: The parts trained this round; others keep the merged value, and their moments wait.

    Returns:
        The state to send next and the memory with the moments moved on.
    """
    memory = dict(memory)
    if {"A", "B", "sigma"} <= trains:
        spelled = {name: in_gauge_of(factors, current.layers[name]) for name, factors in merged.layers.items()}
        merged = AdapterState(spelled, merged.tensors)
    before = to_coordinates(current, sigma_transform, trains)
    after = to_coordinates(merged, sigma_transform, trains)
    moved = {}
    for name, start in before.items():
        change = after[name] - start
        first = memory.get(f"first/{name}", torch.zeros_like(change))
        second = memory.get(f"second/{name}", torch.zeros_like(change))
        step, memory[f"first/{name}"], memory[f"second/{name}"] = moments_step(change, first, second, settings)
        moved[name] = start + settings.server_learning_rate * step
    if settings.server_optimizer == "momentum":
        memory = {name: t for name, t in memory.items() if not name.startswith("second/")}
    return from_coordinates(moved, merged, sigma_transform), memory


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
