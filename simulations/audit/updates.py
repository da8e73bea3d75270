"""Canaries that are clients: each sends an update of its own random direction, or zeros, and is looked for in what is
released.

This is the strongest update that a client can send: all of the clipping norm in one direction that the auditor knows.
Under `privacy.mode = client` the auditor sees what a merge sees, under `local` what the server is sent, in every round;
a canary's score is how far that lies in the canary's direction. `bora_fl.privacy.audit` makes a lower bound of ε of the
scores, and the product's own mechanisms, `ClientPrivacy` and `LocalPrivacy`, make the noise and the claim.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bora_fl.client.site import Site
from bora_fl.config import ConfigError, Settings
from bora_fl.paths import state_in
from bora_fl.privacy.audit import audit, draw_inclusion
from bora_fl.privacy.gaussian import Randomness, from_coordinates, to_coordinates
from bora_fl.privacy.local import LocalPrivacy
from bora_fl.seeds import derive
from bora_fl.simulations.audit.canaries import Audit
from bora_fl.state import AdapterState, ClientUpdate, flatten, unflatten
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.client_privacy import ClientPrivacy
from bora_fl.strategies.server_state import ServerState

# A round of a mode: adds each canary's score, and returns ε so far and the noise multiplier.
Round = Callable[[Tensor], tuple[float, float]]
_LOUD = 3.0  # times the clipping norm, so that every canary is clipped


def run_update_audit(
    settings: Settings, canaries: int, *, confidence: float = 0.95, inclusion: Randomness | None = None
) -> Audit:
    """Release the updates of as many clients as there are canaries in every planned round, and bound ε from below.

    Args:
        settings: `privacy.mode` is `"client"` or `"local"`.
        canaries: How many clients; about half of them send more than zeros.
        confidence: Of the bound.
        inclusion: Decides which; left out, the operating system's.

    Raises:
        ConfigError: If there are too few canaries.
    """
    if canaries < 32:
        raise ConfigError(f"--canaries {canaries}: too few to find anything; give 32 or more")
    included = draw_inclusion(canaries, inclusion)
    directions = _Directions(Site(settings).model().read(), settings)
    scores = torch.zeros(canaries, dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder, state_in(Path(folder)):
        if settings.privacy.mode == "client":
            step = _at_the_server(settings, directions, included)
        else:
            step = _at_the_clients(settings, directions, included)
        for _ in range(settings.run.num_rounds):
            claimed, noise = step(scores)
    found = replace(audit(scores, included, settings.privacy.delta, confidence=confidence), unit="client")
    apart = float(scores[included].mean()), float(scores[~included].mean())
    return Audit(claimed, found, noise, apart, "client")


class _Directions:
    """Every canary's unit vector, made anew from its number where it is needed; there may be thousands."""

    def __init__(self, start: AdapterState, settings: Settings) -> None:
        self.start, self.transform, self.loud = start, settings.adapter.transform, _LOUD * settings.privacy.clip_norm
        self.parts = build(settings).shares() - settings.adapter.untrained
        self.seed = settings.run.seed
        flat = flatten(start)
        self.names = [n for n in flat if (n.startswith("tensors/") and "tensors" in self.parts) or self._factor(n)]
        self.origin = to_coordinates({name: flat[name].double() for name in self.names}, self.transform)

    def _factor(self, name: str) -> bool:
        return not name.startswith("tensors/") and name.rpartition("/")[2] in self.parts

    def of(self, canary: int) -> Tensor:
        """Its vector, over all trained entries."""
        generator = torch.Generator().manual_seed(derive(self.seed, "canary", canary))
        size = sum(tensor.numel() for tensor in self.origin.values())
        vector = torch.randn(size, dtype=torch.float64, generator=generator)
        unit: Tensor = vector / vector.norm()
        return unit

    def moved(self, vector: Tensor) -> AdapterState:
        """The state after an update along a vector that is beyond the clipping norm."""
        sizes = [tensor.numel() for tensor in self.origin.values()]
        parts = torch.split(self.loud * vector, sizes)
        ends = {n: t + part.view(t.shape) for (n, t), part in zip(self.origin.items(), parts, strict=True)}
        flat = flatten(self.start)
        return unflatten(flat | from_coordinates(ends, self.transform))

    def moves(self, state: AdapterState) -> Tensor:
        """How far a released state lies from the start, over all trained entries."""
        flat = flatten(state)
        ends = to_coordinates({name: flat[name].double() for name in self.names}, self.transform)
        return torch.cat([(ends[name] - start).flatten() for name, start in self.origin.items()])


def _at_the_server(settings: Settings, directions: _Directions, included: Tensor) -> Round:
    aggregator = build(settings)
    privacy = ClientPrivacy.build(settings, aggregator.linear)
    assert privacy is not None
    state = ServerState.start(directions.start)
    privacy.check(state, len(included))
    chosen = [k for k in range(len(included)) if included[k]]
    updates = [ClientUpdate(k, 1.0, directions.moved(directions.of(k))) for k in chosen]

    def step(scores: Tensor) -> tuple[float, float]:
        nonlocal state
        state, seen, spent = privacy.protect(state, updates, aggregator.shares(), len(included))
        total = sum((directions.moves(update.state) for update in seen), start=torch.zeros(()))
        scores += torch.stack([directions.of(k) @ total for k in range(len(included))])
        assert state.privacy is not None
        return spent, state.privacy.history[-1].noise_multiplier

    return step


def _at_the_clients(settings: Settings, directions: _Directions, included: Tensor) -> Round:
    shares = build(settings).shares()

    def step(scores: Tensor) -> tuple[float, float]:
        # All clients book alike; one ledger stands for every one.
        booked = LocalPrivacy.book(settings, "audit", 0)
        for k in range(len(included)):
            vector = directions.of(k)
            trained = directions.moved(vector) if included[k] else directions.start
            scores[k] += vector @ directions.moves(booked.protect(trained, directions.start, shares))
        return booked.epsilon, booked.noise_multiplier

    return step
