import math

import pytest
import torch
from flwr.app import Context, RecordDict

from bora_fl.blocks import BlockFactors, at_rank
from bora_fl.client.job import perform
from bora_fl.client.site import site
from bora_fl.config import ConfigError, parse
from bora_fl.privacy.accounting import BudgetExceeded, epsilon
from bora_fl.privacy.gaussian import SeededRandomness
from bora_fl.privacy.local import LocalPrivacy
from bora_fl.report import round_line, training_rows
from bora_fl.simulations.engine import simulate
from bora_fl.state import AdapterState, flatten
from bora_fl.strategies.observer import RunFailedError
from bora_fl.strategies.presets import PRESETS
from bora_fl.wire.records import Instruction, to_arrays
from bora_fl.wire.schema import INSTRUCTION, REPLY, STATE

DELTA = 1e-2
ALL = frozenset({"A", "sigma", "B", "tensors"})


@pytest.fixture
def private(tiny_config, tmp_path):
    return tiny_config | {
        "privacy.mode": "local",
        "privacy.epsilon": 50.0,
        "privacy.delta": DELTA,
        "privacy.accountant": "rdp",
        "privacy.clip-norm": 0.1,
        "privacy.ledger-dir": str(tmp_path / "ledger"),
        "strategy.weighting": "uniform",
    }


def state(seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    factors = BlockFactors(
        torch.randn(8, 2, generator=generator),
        torch.randn(2, 2, 2, generator=generator).exp(),
        torch.randn(2, 6, generator=generator),
        1.0,
    )
    return AdapterState({"q": factors}, {"head": torch.randn(3, 4, generator=generator)})


def flat_move(after: AdapterState, before: AdapterState) -> torch.Tensor:
    a, b = flatten(after), flatten(before)
    return torch.cat([((a[n].log() - b[n].log()) if n.endswith("/sigma") else a[n] - b[n]).flatten() for n in a])


def test_without_noise_an_update_within_the_norm_is_sent_as_it_is():
    same = LocalPrivacy(1e9, 0.0, math.inf, "exp_norm").protect(state(1), state(0), ALL)
    for name, tensor in flatten(state(1)).items():
        torch.testing.assert_close(flatten(same)[name], tensor)


def test_the_whole_update_is_clipped_jointly():
    clipped = LocalPrivacy(0.5, 0.0, math.inf, "exp_norm").protect(state(1), state(0), ALL)
    move, true = flat_move(clipped, state(0)), flat_move(state(1), state(0))
    assert float(move.norm()) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(move / move.norm(), true / true.norm(), rtol=1e-4, atol=1e-5)


def test_noise_is_on_every_coordinate_that_is_sent_and_on_no_other():
    before, parts = state(0), frozenset({"B", "sigma"})
    moves = []
    for seed in range(300):
        sent = LocalPrivacy(0.5, 3.0, 1.0, "exp_norm").protect(before, before, parts, SeededRandomness(seed))
        torch.testing.assert_close(sent.layers["q"].A, before.layers["q"].A, rtol=0, atol=0)
        torch.testing.assert_close(sent.tensors["head"], before.tensors["head"], rtol=0, atol=0)
        moves.append(flat_move(sent, before))
    deviation = torch.stack(moves).std(dim=0)
    noised = deviation > 0
    assert int(noised.sum()) == 8 * 2 + 2 * 2 * 2
    torch.testing.assert_close(deviation[noised], torch.full((24,), 1.5, dtype=deviation.dtype), rtol=0.25, atol=0)


def test_the_sigma_of_plain_lora_is_no_parameter_and_takes_no_noise():
    before = state(0)
    private = LocalPrivacy(0.5, 3.0, 1.0, "exp_norm", frozen=frozenset({"sigma"}))
    assert torch.equal(private.protect(before, before, ALL).layers["q"].sigma, before.layers["q"].sigma)


@pytest.mark.parametrize("strategy", sorted(set(PRESETS) - {"regmean"}))  # which no private run takes
def test_every_strategy_takes_noised_updates_and_the_run_uses_up_its_budget(strategy: str, private):
    rows = training_rows(simulate(private | {"strategy.name": strategy, "run.num-rounds": 2}, 3) / "metrics.jsonl")
    assert all(row["rejected"] == 0 and row["clients"] == 3 for row in rows)
    assert 49 < rows[-1]["epsilon"]["largest"] <= 50.0
    assert rows[-1]["epsilon"]["unit"] == "client"
    assert "per client" in round_line(rows[-1], 2)


def test_one_reply_is_one_step_at_rate_one(private):
    rows = training_rows(simulate(private | {"privacy.noise-multiplier": 2.0}, 3) / "metrics.jsonl")
    for row in rows:
        expected = epsilon([(2.0, 1.0, row["round"])], DELTA, "rdp")
        assert {m["epsilon-per-client"] for m in row["per_client"].values()} == {expected}


def test_nothing_but_the_noised_update_tells_of_the_data(private):
    row = training_rows(simulate(private, 3) / "metrics.jsonl")[0]
    for metrics in row["per_client"].values():
        assert set(metrics) == {"partition", "rank", "num-examples", "epsilon-per-client", "noise-multiplier"}
        assert metrics["num-examples"] == 1


def test_past_the_budget_the_site_refuses_and_the_server_is_told(private):
    tight = private | {"privacy.noise-multiplier": 1.0, "privacy.epsilon": epsilon([(1.0, 1.0, 2)], DELTA, "rdp")}
    rows = training_rows(simulate(tight | {"run.num-rounds": 3}, 3) / "metrics.jsonl")
    assert [row["clients"] for row in rows] == [3, 3, 0]
    assert all("budget-exceeded" in reason for reason in rows[2]["reasons"].values())


def test_a_second_run_goes_on_with_the_first_ones_ledger(private, tmp_path):
    simulate(private, 3)
    with pytest.raises(RunFailedError, match="budget"):
        simulate(private | {"run.output-dir": str(tmp_path / "again")}, 3)


def test_record_and_client_ledgers_are_kept_apart(private, tmp_path):
    settings = parse(private | {"privacy.noise-multiplier": 1.0})
    LocalPrivacy.book(settings, "run", 0)
    assert [path.name.endswith("-client.json") for path in (tmp_path / "ledger").glob("*.json")] == [True]
    beyond = parse(private | {"privacy.noise-multiplier": 0.01})
    with pytest.raises(BudgetExceeded, match="per client"):
        LocalPrivacy.book(beyond, "run", 0)


def test_a_reply_of_another_rank_would_hold_what_is_kept_and_is_refused(private):
    mixed = private | {"strategy.name": "fedsa", "adapter.sigma-transform": "identity"}
    rows = training_rows(simulate(mixed, 3, node_configs={1: {"rank": 1}}) / "metrics.jsonl")
    assert "rank-mismatch" in rows[0]["reasons"]["3"]


@pytest.mark.parametrize("since", ["now", "an earlier round"])
def test_no_message_makes_a_site_send_what_is_not_noised(since: str, private):
    """A state of another rank than the run's asks for every factor back, whatever the message says is shared."""
    settings = parse(private | {"privacy.noise-multiplier": 1.0})
    memory, here = RecordDict(), site(settings).model(settings.adapter.rank).read()
    layers = {name: at_rank(f, f.rank + 1, settings.adapter.transform) for name, f in here.layers.items()}

    def ask(trains: frozenset[str], shares: frozenset[str], sent: AdapterState) -> RecordDict:
        instruction = Instruction(1, "run", trains, shares, False)
        content = RecordDict({STATE: to_arrays(flatten(sent)), INSTRUCTION: instruction.record()})
        node = {"partition-id": 0, "num-partitions": 3}
        return perform("train", content, Context(1, 2, node, memory, settings.flat()))

    factors = frozenset({"A", "sigma", "B"})
    if since == "an earlier round":
        ask(ALL, factors, here)  # the trained head stays
    reply = ask(factors if len(memory) else ALL, factors, AdapterState(layers, here.tensors))
    assert reply.config_records[REPLY].get("refused") == "rank-mismatch"
    assert not reply.array_records


@pytest.mark.parametrize(
    ("extra", "key"),
    [({}, r"strategy\.weighting"), ({"strategy.weighting": "uniform", "strategy.fraction-evaluate": 0.5}, "evaluate")],
)
def test_settings_that_would_leak_are_refused(extra, key: str):
    with pytest.raises(ConfigError, match=key):
        parse({"privacy.mode": "local"} | extra)
