"""Server optimizers: against their recursions written out in NumPy, and the law that a plain step changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bora_fl.blocks import BlockFactors
from bora_fl.config import AdapterSettings, Settings, StrategySettings
from bora_fl.state import ALL, AdapterState, ClientUpdate
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.alignment import in_gauge_of
from bora_fl.strategies.presets import PRESETS
from bora_fl.strategies.server_optimizers import OptimizerState
from bora_fl.strategies.server_state import ServerState

STEPPABLE = [name for name, row in PRESETS.items() if not row.no_server_optimizer]
FLEET_NAMES = ("bora exp_norm", "bora identity", "one block", "one block identity", "lora")


@pytest.mark.parametrize("fleet", FLEET_NAMES)
@pytest.mark.parametrize("name", STEPPABLE)
def test_a_full_step_without_momentum_is_no_optimizer(name, fleet, fleets, dense):
    if fleet == "lora" and PRESETS[name].no_lora:
        pytest.skip(PRESETS[name].no_lora)
    plain = fleets[fleet].built(name)
    stepped = fleets[fleet].built(name, server_optimizer="momentum", server_momentum=0.0)
    state, updates = fleets[fleet].round(plain)
    wanted, _ = plain.aggregate(state, updates, 1)
    found, _ = stepped.aggregate(state, updates, 1)
    torch.testing.assert_close(found.current.tensors["head"], wanted.current.tensors["head"])
    if name == "fedsa":
        torch.testing.assert_close(found.current.layers["query"].A, wanted.current.layers["query"].A)
    else:
        assert dense.gap(dense.model(found), dense.model(wanted)) < 1e-6


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi"])
def test_the_recursions(kind):
    """Three rounds on a bare tensor, against the papers' recursions."""
    settings = StrategySettings(
        name="fedavg",
        server_optimizer=kind,
        server_learning_rate=0.3,
        server_momentum=0.8,
        server_beta2=0.9,
        server_epsilon=0.05,
    )
    agg = build(Settings(strategy=settings, adapter=AdapterSettings(method="full")))
    rng = np.random.default_rng(0)
    x = rng.normal(size=6)
    state = ServerState.start(AdapterState({}, {"w": torch.tensor(x)}))
    first, second = np.zeros(6), np.zeros(6)
    for round in (1, 2, 3):
        clients = rng.normal(size=(3, 6))
        delta = clients.mean(0) - x
        if kind == "momentum":
            first = 0.8 * first + delta
            x = x + 0.3 * first
        else:
            first = 0.8 * first + 0.2 * delta
            sign = np.sign(second - delta**2)
            second = 0.9 * second + 0.1 * delta**2 if kind == "adam" else second - 0.1 * delta**2 * sign
            x = x + 0.3 * first / (np.sqrt(second) + 0.05)
        updates = [ClientUpdate(k, 2.0, AdapterState({}, {"w": torch.tensor(c)})) for k, c in enumerate(clients)]
        state, _ = agg.aggregate(state, updates, round)
        np.testing.assert_allclose(state.current.tensors["w"].numpy(), x, rtol=1e-12)


@pytest.mark.parametrize("fleet", FLEET_NAMES)
def test_momentum_goes_on_where_the_clients_stop(fleet, fleets):
    """After one round of change, a round in which no client moves still moves the model, the same way."""
    agg = fleets[fleet].built("refactor", server_optimizer="momentum", server_momentum=0.5)
    fleets[fleet].drift = 0.1
    start, updates = fleets[fleet].round(agg)
    moved, _ = agg.aggregate(start, updates, 1)
    still = [ClientUpdate(k, 1.0, moved.current) for k in range(3)]
    after, _ = agg.aggregate(moved, still, 2)
    head = [state.current.tensors["head"] for state in (start, moved, after)]
    torch.testing.assert_close(head[2] - head[1], 0.5 * (head[1] - head[0]))
    products = [state.current.layers["query"].dense() for state in (start, moved, after)]
    ahead, before = products[2] - products[1], products[1] - products[0]
    assert float((ahead * before).sum() / (ahead.norm() * before.norm())) > 0.5


def test_a_frozen_factor_is_not_moved_by_its_old_moments(fleets):
    agg = fleets["bora exp_norm"].built("rolora", server_optimizer="momentum", server_momentum=0.9)
    fed = fleets["bora exp_norm"]
    state, updates = fed.round(agg, round=1)
    state, _ = agg.aggregate(state, updates, 1)
    assert agg.trains(2) == {"A", "tensors"}
    updates = [ClientUpdate(k, 1.0, fed.train(state.current, agg.trains(2), k)) for k in range(3)]
    after, _ = agg.aggregate(state, updates, 2)
    assert torch.equal(after.current.layers["query"].B, state.current.layers["query"].B)
    assert not torch.equal(after.current.layers["query"].A, state.current.layers["query"].A)


def test_moments_are_plain_tensors_by_name(fleets):
    agg = fleets["lora"].built("fedavg", server_optimizer="adam", server_learning_rate=0.01)
    state, updates = fleets["lora"].round(agg)
    after, _ = agg.aggregate(state, updates, 1)
    flat = after.optimizer.to_tensors()
    assert {"first/layers/query/B", "second/tensors/head"} <= flat.keys()
    copied = replace(after, optimizer=OptimizerState.from_tensors({name: t.clone() for name, t in flat.items()}))
    again = [ClientUpdate(k, 1.0, fleets["lora"].train(after.current, agg.trains(2), k)) for k in range(3)]
    first, second = agg.aggregate(after, again, 2)[0], agg.aggregate(copied, again, 2)[0]
    assert torch.equal(first.current.layers["query"].B, second.current.layers["query"].B)


@pytest.mark.parametrize("fleet", FLEET_NAMES)
def test_factors_in_another_gauge_are_brought_back(fleet, fleets):
    """Rescaled, permuted (blocks) or mixed (one block) factors of a nearby update become nearby factors again."""
    fed = fleets[fleet]
    reference = fed.initial().layers["query"]
    fed.drift = 0.01
    near = fed.train(fed.initial(), ALL, 1).layers["query"]
    g = torch.Generator().manual_seed(5)
    b = near.num_blocks
    if b == 1:
        T = torch.randn(4, 4, generator=g, dtype=torch.float64) + 3 * torch.eye(4)
        B = near.B * near.sigma[0, 0] @ torch.linalg.inv(T)
        rewritten = BlockFactors(B, torch.ones_like(near.sigma), T @ near.A, near.scaling)
    else:
        rows = torch.rand(b, 4, generator=g, dtype=torch.float64) + 0.5
        columns = torch.rand(b, 4, generator=g, dtype=torch.float64) + 0.5
        B = (near.B.reshape(b, -1, 4) / rows[:, None]).reshape(near.B.shape)
        A = (near.A.reshape(4, b, -1) / columns.T[:, :, None]).reshape(near.A.shape)
        order = [2, 3, 0, 1]
        sigma = near.sigma * rows[:, None] * columns[None]
        rewritten = BlockFactors(B[:, order], sigma[..., order], A[order], near.scaling)
    torch.testing.assert_close(rewritten.dense(), near.dense())
    back = in_gauge_of(rewritten, reference)
    torch.testing.assert_close(back.dense(), near.dense())
    for part in ("B", "sigma", "A"):
        moved = getattr(back, part) - getattr(reference, part)
        assert float(moved.norm()) < 0.1 * float(getattr(reference, part).norm())
