"""Client-level privacy of a run: what it says it spends against what its noise is worth, and who counts."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import brentq
from scipy.special import ndtr

from bora_fl.blocks import at_rank
from bora_fl.config import ConfigError, parse
from bora_fl.privacy.accounting import BudgetExceeded
from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate
from bora_fl.state import AdapterState, ClientUpdate, flatten
from bora_fl.strategies.aggregation import Aggregator
from bora_fl.strategies.client_privacy import ClientPrivacy
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import from_arrays, to_arrays
from bora_fl.wire.schema import STATE

ALL = frozenset({"A", "sigma", "B", "tensors"})


@pytest.fixture
def private(tiny_config):
    return tiny_config | {
        "privacy.mode": "client",
        "privacy.epsilon": 50.0,
        "privacy.delta": 1e-2,
        "privacy.accountant": "rdp",
        "strategy.weighting": "uniform",
    }


class Constant:
    """Every normal value is the same: with zeros a mechanism shows what it computes, with ones its noise."""

    def __init__(self, value: float) -> None:
        self.value = value

    def normal(self, count: int) -> torch.Tensor:
        return torch.full((count,), self.value, dtype=torch.float64)

    def uniform(self, count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.float64) / count


def make(num_rounds: int = 12, linear: bool = True, value: float = 1.0, **privacy) -> ClientPrivacy:
    given = {"privacy.mode": "client", "privacy.accountant": "rdp", "strategy.weighting": "uniform"}
    given |= {f"privacy.{key.replace('_', '-')}": setting for key, setting in privacy.items()}
    made = ClientPrivacy.build(parse(given | {"run.num-rounds": num_rounds}), linear)
    assert made is not None
    return replace(made, randomness=Constant(value), sigma_transform="identity")


def exact_epsilon(mu: float, delta: float) -> float:
    """ε of a Gaussian release whose shift over its noise is μ (Balle and Wang, 2018, theorem 8)."""

    def gap(e: float) -> float:
        return float(ndtr(mu / 2 - e / mu) - math.exp(e) * ndtr(-mu / 2 - e / mu)) - delta

    return float(brentq(gap, 0.0, 400.0))


def scalar_state() -> ServerState:
    return ServerState.start(AdapterState({}, {"w": torch.zeros(1, dtype=torch.float64)}))


def spend(privacy: ClientPrivacy, state: ServerState, rounds: int) -> tuple[ServerState, float, float]:
    """Rounds without updates on one number, whose noise then stands there in full: Σ 1/z², and the last ε said."""
    total = said = 0.0
    for _ in range(rounds):
        state, seen, said = privacy.protect(state, [], ALL, 1)
        total += 1 / float(seen[0].state.tensors["w"]) ** 2
    return state, total, said


@pytest.mark.parametrize("strategy", ["fedavg", "refactor", "ffa"])
def test_a_run_uses_up_its_budget_and_no_more(strategy: str, private):
    rows = training_rows(simulate(private | {"strategy.name": strategy}, 3) / "metrics.jsonl")
    spent = [row["epsilon"]["largest"] for row in rows]
    assert spent == sorted(spent)
    assert 49 < spent[-1] <= 50.0
    assert rows[0]["epsilon"]["unit"] == "client"


@pytest.mark.parametrize(("first", "then"), [(12, 12), (12, 24), (12, 6), (6, 40)])
def test_a_run_that_goes_on_with_other_rounds_says_what_its_noise_was_worth(first: int, then: int):
    state, before, _ = spend(make(first), scalar_state(), 4)
    state = ServerState.from_tensors(state.to_tensors(), 0)  # a checkpoint
    _, after, said = spend(make(then), state, then - 4)
    assert exact_epsilon(math.sqrt(before + after), 1e-5) <= said <= 6.0
    assert said > 5.9


def test_rounds_to_come_have_the_noise_of_those_before_where_nothing_has_changed():
    privacy, state = make(), scalar_state()
    drawn = []
    for _ in range(12):
        state, seen, _ = privacy.protect(state, [], ALL, 1)
        drawn.append(float(seen[0].state.tensors["w"]))
    assert len(set(drawn)) == 1


def test_a_run_that_has_spent_its_budget_does_not_go_on():
    state, _, _ = spend(make(3, noise_multiplier=1.85), scalar_state(), 3)
    make(3, noise_multiplier=1.85).check(state, 3)
    with pytest.raises(BudgetExceeded, match="Nothing was trained"):
        make(30, noise_multiplier=1.85).check(state, 3)
    with pytest.raises(ValueError, match=r"out of reach for 27 steps after 4\.\d+ spent"):
        make(30, epsilon=4.0).check(state, 3)


def test_the_budget_survives_a_restart(private):
    fixed = private | {"privacy.noise-multiplier": 0.7, "run.num-rounds": 2, "train.local-steps": 1}
    simulate(fixed, 3)
    with pytest.raises(BudgetExceeded):
        simulate(fixed | {"run.num-rounds": 60, "run.resume": True}, 3)


# Who counts


def an_update(client: int, value: float) -> ClientUpdate:
    return ClientUpdate(client, 1.0, AdapterState({}, {"w": torch.full((1,), value, dtype=torch.float64)}))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("answered", [0, 1, 3])
def test_a_missing_client_counts_as_one_that_did_not_move(linear: bool, answered: int):
    privacy = make(linear=linear, value=0.0, clip_norm=10.0)
    _, seen, _ = privacy.protect(scalar_state(), [an_update(k, 3.0) for k in range(answered)], ALL, 3)
    assert len(seen) == (1 if linear else 3)
    mean = sum(float(update.state.tensors["w"]) for update in seen) / len(seen)
    assert mean == pytest.approx(3.0 * answered / 3)


@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
@pytest.mark.parametrize("rank", [1, 3])
def test_an_update_of_smaller_rank_counts_as_zero(transform: str, rank: int, fleets):
    fleet = replace(fleets[f"bora {transform}"], transform=transform)
    privacy = replace(make(linear=False, value=0.0), sigma_transform=transform)
    state = ServerState.start(fleet.initial())
    layers = {name: at_rank(factors, rank, transform) for name, factors in state.current.layers.items()}
    small = ClientUpdate(1, 1.0, AdapterState(layers, state.current.tensors))
    assert "use the federation's rank" in privacy.refuses(small, state)
    _, seen, _ = privacy.protect(state, [small], ALL, 1)
    for name, tensor in flatten(state.current).items():
        torch.testing.assert_close(flatten(seen[0].state)[name], tensor)


@pytest.mark.parametrize("strategy", ["refactor", "fedavg"])
def test_a_client_of_smaller_rank_is_told_why_and_the_run_goes_on(strategy: str, private):
    mixed = private | {"adapter.sigma-transform": "identity", "strategy.name": strategy}
    rows = training_rows(simulate(mixed, 3, node_configs={2: {"rank": 1}}) / "metrics.jsonl")
    assert [row["clients"] for row in rows] == [2, 2, 2]
    assert "use the federation's rank" in rows[0]["reasons"]["4"]
    assert rows[-1]["epsilon"]["largest"] <= 50.0


def broken(reply):
    flat = from_arrays(reply.content.array_records[STATE])
    reply.content[STATE] = to_arrays({name: tensor * math.nan for name, tensor in flat.items()})
    return reply


def test_a_round_counts_whatever_the_replies_hold(private):
    """Were it passed over for want of good replies, that it was would tell what a reply held, at no charge."""
    answers = []

    def break_the_second_round(reply, partition: int):
        answers.append(partition)
        return broken(reply) if 3 < len(answers) <= 6 else reply

    rows = training_rows(simulate(private | {"run.num-rounds": 2}, 3, tamper=break_the_second_round) / "metrics.jsonl")
    assert [row["clients"] for row in rows] == [3, 0]
    assert rows[0]["epsilon"]["largest"] < rows[1]["epsilon"]["largest"] <= 50.0


def test_what_a_round_has_spent_stays_spent_if_its_merge_fails(private, monkeypatch):
    def fail(self, state, updates, round):
        return replace(state, current=AdapterState(state.current.layers, {"w": torch.tensor([math.nan])})), {}

    monkeypatch.setattr(Aggregator, "aggregate", fail)
    rows = training_rows(simulate(private, 3) / "metrics.jsonl")
    spent = [row["epsilon"]["largest"] for row in rows]
    assert spent[0] < spent[1] < spent[2]


# Settings


def test_adaptive_clipping_starts_with_three_clients_and_moves_the_clip_norm(private):
    chosen = private | {"privacy.adaptive-clipping": True, "strategy.name": "fedavg"}
    rows = training_rows(simulate(chosen, 3) / "metrics.jsonl")
    assert 49 < rows[-1]["epsilon"]["largest"] <= 50.0


def test_adaptive_clipping_follows_the_updates():
    privacy = make(value=0.0, adaptive_clipping=True, clip_norm=2.0)
    state, _, _ = privacy.protect(scalar_state(), [an_update(k, 9.0) for k in range(4)], ALL, 4)
    state, _, _ = privacy.protect(state, [an_update(k, 9.0) for k in range(4)], ALL, 4)
    _, seen, _ = privacy.protect(state, [an_update(k, 9.0) for k in range(4)], ALL, 4)
    assert float(seen[0].state.tensors["w"]) == pytest.approx(2.0 * math.exp(2 * 0.2 * 0.5))


def test_adaptive_clipping_of_single_updates_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.adaptive-clipping = true with strategy\.name = 'refactor'"):
        make(linear=False, adaptive_clipping=True)


def test_a_delta_that_publishing_one_client_would_keep_to_is_refused(private):
    with pytest.raises(ConfigError, match=r"privacy\.delta = 0\.4 with 3 clients"):
        simulate(private | {"privacy.delta": 0.4}, 3)


def test_unequal_weights_are_refused():
    with pytest.raises(ConfigError, match=r"strategy\.weighting"):
        parse({"privacy.mode": "client"})


@pytest.mark.parametrize(
    "rule",
    [
        {"robust": "krum"},
        {"robust": "median"},
        {"max-update-norm": 1.0},
        {"min-cosine": 0.0},
        {"max-loss-increase": 0.1},
        {"max-weight-ratio": 0.5},
    ],
)
def test_rules_by_which_one_client_decides_who_else_counts_are_refused(rule: dict[str, str | float]):
    given = {f"strategy.{key}": value for key, value in rule.items()}
    with pytest.raises(ConfigError, match=rf"strategy\.{next(iter(rule))} = .*judges updates by each other"):
        parse({"privacy.mode": "client", "strategy.weighting": "uniform"} | given)
