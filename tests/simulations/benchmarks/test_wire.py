"""The made-up clients answer as clients do: the server takes every reply of every strategy."""

import pytest

from bora_fl.simulations.benchmarks import wire
from bora_fl.strategies.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_strategy_takes_the_replies(name, monkeypatch) -> None:
    monkeypatch.setattr(wire, "SIDE", 16)
    monkeypatch.setattr(wire, "LAYERS", 2)
    monkeypatch.setattr(wire, "RANK", 2)
    rows = wire.measure({"strategy.name": name, "strategy.sweeps": 1}, clients=2, rounds=3)
    assert len(rows) == 3
    assert all(up > 0 and down > 0 for up, down in rows)
