"""A run ends with the round of least held-out loss, by losses over the same examples."""

import json
from pathlib import Path

import pytest
import torch

from bora_fl.config import ConfigError, parse
from bora_fl.report import ClientMetrics, read_rows, training_rows
from bora_fl.server.checkpoint import load_newest, load_round
from bora_fl.simulations.engine import round_of, simulate
from bora_fl.state import AdapterState
from bora_fl.strategies.best import Best
from bora_fl.strategies.screening import credible
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import from_arrays, to_arrays
from bora_fl.wire.schema import STATE

ADAPTER = AdapterState({}, {"head": torch.tensor([1.0, 2.0])})


def best(round: int, *measured: tuple[int, float, float], fold_version: int = 0) -> Best:
    metrics = {k: ClientMetrics(eval_loss=loss, eval_accuracy=0.5, eval_examples=n) for k, loss, n in measured}
    found = Best.of(round, ADAPTER, metrics, fold_version)
    assert found
    return found


def test_losses_are_compared_over_the_examples_that_both_rounds_have():
    first = best(1, (0, 1.0, 10), (1, 1.0, 30))
    assert best(2, (0, 1.5, 10), (1, 0.8, 30)).beats(first)  # 5 more, 6 less
    assert not best(2, (0, 1.7, 10), (1, 0.8, 30)).beats(first)
    assert not best(2, (0, 1.0, 10), (1, 1.0, 30)).beats(first)  # of equal ones the earlier
    assert best(2, (0, 0.9, 10)).beats(first)
    assert not best(2, (0, 1.1, 10), (7, 0.0, 9999)).beats(first)
    assert not best(2, (7, 0.0, 9999)).beats(first)
    assert best(2, (0, 9.0, 10), fold_version=1).beats(first)
    assert Best.of(3, ADAPTER, {0: ClientMetrics(train_loss=1.0)}) is None


def test_a_client_that_claims_a_million_examples_does_not_choose_the_round():
    claims = {0: 10.0, 1: 12.0, 2: 1e6}
    metrics = {k: ClientMetrics(eval_loss=0.1, eval_accuracy=0.5, eval_examples=n) for k, n in claims.items()}
    assert credible(metrics, 1000.0).keys() == {0, 1}
    assert credible(metrics, 0.0) == metrics


@pytest.mark.parametrize("lie", [1e30, 1e6, 50.0])
def test_a_client_that_claims_a_huge_loss_does_not_choose_the_round(lie: float):
    """Nor does it make every round one to go back from."""
    first = best(1, *[(k, 1.0, 10) for k in range(12)], (12, 0.0, 10))
    better = best(2, *[(k, 0.9, 10) for k in range(12)], (12, lie, 10))
    assert better.beats(first)
    assert best(2, *[(k, 1.1, 10) for k in range(12)], (12, 0.0, 10)).excess(first) > 0
    worse = best(3, *[(k, 1.1, 10) for k in range(12)], (12, 0.0, 10))
    assert not worse.beats(best(2, *[(k, 1.0, 10) for k in range(12)], (12, lie, 10)))


def test_clients_that_see_no_difference_do_not_silence_the_others():
    first = best(1, (0, 1.0, 10), (1, 1.0, 10), (2, 1.0, 10))
    assert best(2, (0, 1.0, 10), (1, 1.0, 10), (2, 0.5, 10)).beats(first)
    assert best(2, (0, 1.0, 10), (1, 1.0, 10), (2, 1.5, 10)).excess(first) == pytest.approx(0.5 / 3)


def test_it_survives_a_checkpoint():
    state = ServerState.start(ADAPTER)
    state = ServerState(ADAPTER, best=best(4, (0, 0.25, 3), (5, 0.5, 7), fold_version=2), class_shares=(0.25, 0.75))
    back = ServerState.from_tensors(state.to_tensors(), 0)
    assert back.class_shares == state.class_shares
    assert back.best is not None
    assert (back.best.round, back.best.measured) == (4, state.best.measured)  # type: ignore[union-attr]
    assert back.best.fold_version == 2
    assert torch.equal(back.best.adapter.tensors["head"], ADAPTER.tensors["head"])


@pytest.mark.parametrize("keep", [True, False])
def test_a_last_round_that_makes_things_worse_is_not_what_a_run_ends_with(tiny_config, tmp_path: Path, keep: bool):
    def ruin(message, partition):
        if round_of(message) == 3 and STATE in message.content.array_records:
            sent = from_arrays(message.content.array_records[STATE])
            message.content[STATE] = to_arrays({n: t * (1000.0 if "tensors" in n else 1.0) for n, t in sent.items()})
        return message

    folder = simulate(tiny_config | {"run.keep-best": keep}, 3, tamper=ruin)
    rows = training_rows(folder / "metrics.jsonl")
    last = rows[-1]
    if not keep:
        assert last["kept"] is None
        assert last["loss"] > 1.5 * rows[1]["loss"]
        return
    kept = next(row for row in read_rows(folder / "metrics.jsonl") if row["round"] == last["kept"])
    assert last["kept"] < 3
    assert last["loss"] == pytest.approx(kept["loss"], abs=1e-6)
    assert last["client_loss"] == min(row["client_loss"] for row in rows)


def test_an_adapter_of_other_frozen_weights_does_not_come_back(tiny_config):
    """Each round of fedex changes them, and after the last one nobody evaluates."""
    given = {"strategy.name": "fedex", "run.keep-best": True}
    folder = simulate(tiny_config | given, 3, tamper=lambda reply, _: reply if round_of(reply) else None)
    assert [row["kept"] for row in read_rows(folder / "metrics.jsonl")] == [None] * 4


def test_what_the_server_kept_since_the_best_round_goes_with_the_rounds(tiny_config):
    given = {"run.keep-best": True, "strategy.name": "refactor", "strategy.residual": "carry"}
    given |= {"strategy.residual-rank": 2}
    folder = simulate(tiny_config | given, 3, tamper=ruin_round(3))
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["kept"] is not None
    checkpoint = load_newest(folder / "checkpoints", json.loads((folder / "config.json").read_text()))
    assert checkpoint is not None
    assert checkpoint.state.carried == {}


def test_a_run_that_no_longer_keeps_the_best_forgets_it(tiny_config):
    simulate(tiny_config | {"run.num-rounds": 1, "run.keep-best": True}, 3)
    given = {"run.num-rounds": 2, "run.keep-best": False, "run.resume": True}
    folder = simulate(tiny_config | given, 3)
    for number, known in {1: True, 2: False}.items():
        assert (load_round(folder / "checkpoints", number).state.best is not None) is known


def test_a_head_that_was_solved_last_is_not_named_where_an_earlier_round_is_kept(tiny_config):
    def ruin(message, partition):
        if round_of(message) == 3 and STATE in message.content.array_records:
            sent = from_arrays(message.content.array_records[STATE])
            message.content[STATE] = to_arrays({n: t * (1.0 if "tensors" in n else 30.0) for n, t in sent.items()})
        return message

    given = {"run.keep-best": True, "head.init": "closed-form", "head.solve-again": "end"}
    rows = read_rows(simulate(tiny_config | given, 3, tamper=ruin) / "metrics.jsonl")
    assert rows[0]["head"]
    assert rows[-1]["kept"] < 3
    assert rows[-1]["head"] == ""


def ruin_round(number: int):
    """Client messages of this round and later, with a head that is 1,000 times too large."""

    def ruin(message, partition):
        if round_of(message) >= number:
            sent = from_arrays(message.content.array_records[STATE])
            message.content[STATE] = to_arrays({n: t * (1000.0 if "tensors" in n else 1.0) for n, t in sent.items()})
        return message

    return ruin


def test_a_run_ends_when_its_patience_does(tiny_config):
    given = {"run.num-rounds": 6, "run.keep-best": True, "run.patience": 2}
    rows = read_rows(simulate(tiny_config | given, 3, tamper=ruin_round(2)) / "metrics.jsonl")
    best = rows[-1]["kept"]
    assert best in (0, 1)
    assert rows[-1]["round"] == best + 3  # what a round merged is measured in the next


def test_a_round_that_makes_things_worse_is_gone_back_from(tiny_config):
    def once(message, partition):
        return ruin_round(2)(message, partition) if round_of(message) == 2 else message

    given = {"run.num-rounds": 4, "run.keep-best": True, "run.restart-margin": 0.5}
    rows = read_rows(simulate(tiny_config | given, 3, tamper=once) / "metrics.jsonl")
    best = rows[3]["kept"]
    assert [row["kept"] for row in rows[1:3]] == [None, None]
    assert best in (0, 1)
    assert rows[2]["loss"] > rows[best]["loss"] + 0.5
    assert rows[3]["loss"] == pytest.approx(rows[best]["loss"], abs=1e-6)


@pytest.mark.parametrize("without", [{"run.keep-best": False}, {"strategy.fraction-train": 0.5}])
def test_patience_needs_the_losses_of_all_clients(tiny_config, without):
    with pytest.raises(ConfigError, match=next(iter(without)).replace(".", r"\.") + ".*run.patience"):
        parse(tiny_config | {"run.keep-best": True, "run.patience": 2} | without)
