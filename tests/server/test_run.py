"""Whole federations in this process: tiny model, tiny data, the real code from config to adapter folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from flwr.app import Message, MetricRecord
from safetensors.torch import load_file

from bora_fl import models
from bora_fl.config import ConfigError
from bora_fl.report import read_rows, training_rows
from bora_fl.server.checkpoint import CheckpointError
from bora_fl.simulations.engine import simulate
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies.aggregation import Aggregator
from bora_fl.strategies.observer import RunFailedError
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.records import from_arrays, to_arrays
from bora_fl.wire.schema import METRICS, STATE


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("strategy", ["fedavg", "refactor"])
def test_a_run_learns_and_writes_what_it_promises(strategy: str, tiny_config):
    config = tiny_config | {"strategy.name": strategy, "run.num-rounds": 6, "train.local-steps": 60}
    config["train.learning-rate"] = 0.01
    folder = simulate(config, 3)
    rows = training_rows(folder / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(1, 7))
    keys = {"loss", "accuracy", "train_loss", "bytes_up", "bytes_down", "seconds", "clients", "rejected"}
    assert all(keys <= row.keys() for row in rows)
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["clients"] == 3
    assert json.loads((folder / "config.json").read_text())["strategy.name"] == strategy
    assert (folder / "partition.png").is_file()
    assert (folder / "rounds.png").is_file()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"round-00005", "round-00006"}


def test_the_adapter_opens_in_peft_and_predicts_as_the_run_did(tiny_config):
    from peft import PeftModel

    from bora_fl.config import parse
    from bora_fl.data import load_dataset, test_data
    from bora_fl.evaluate import evaluate

    folder = simulate(tiny_config, 3)
    settings = parse(tiny_config)
    base = models.load_base(settings.model, load_dataset(settings.data).label_names, seed=99)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    test = test_data(settings.data, settings.model, models.load_tokenizer(settings.model))
    metrics, last = evaluate(model, test, 64), training_rows(folder / "metrics.jsonl")[-1]
    assert (metrics.loss, metrics.accuracy) == (pytest.approx(last["loss"], abs=1e-5), pytest.approx(last["accuracy"]))
    ranks = []
    for layer in (module for module in model.modules() if hasattr(module, "get_delta_weight")):
        shares = torch.linalg.svdvals(layer.get_delta_weight("default").double())
        shares = shares / shares.sum()
        ranks.append(float(torch.distributions.Categorical(shares).entropy().exp()))
    assert last["effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-3)
    assert read_rows(folder / "metrics.jsonl")[0]["effective_rank"] is None  # B is zero before round 1


class Killed(BaseException):
    """As a process that is killed: no handler catches it."""


@pytest.mark.parametrize("strategy", ["refactor", "fedex"])
def test_a_killed_run_resumes_to_the_same_adapter(strategy: str, tiny_config, tmp_path: Path):
    config = tiny_config | {"strategy.name": strategy, "strategy.fraction-train": 0.67}
    whole = adapter(simulate(config, 3))

    config["run.output-dir"] = str(tmp_path / "killed")
    replies = 0

    def kill(message: Message, partition: int) -> Message:
        nonlocal replies
        replies += 1
        if replies == 4:  # the second reply of round 2
            raise Killed
        return message

    with pytest.raises(Killed):
        simulate(config, 3, tamper=kill)
    assert [row["round"] for row in training_rows(tmp_path / "killed" / "metrics.jsonl")] == [1]
    folder = simulate(config | {"run.resume": True}, 3)
    assert [row["round"] for row in training_rows(folder / "metrics.jsonl")] == [1, 2, 3]
    assert equal(adapter(folder), whole)


def test_resuming_passes_over_a_damaged_checkpoint(tiny_config):
    folder = simulate(tiny_config, 3)
    whole = adapter(folder)
    newest = folder / "checkpoints" / "round-00003" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert equal(adapter(simulate(tiny_config | {"run.resume": True}, 3)), whole)


def test_resuming_with_other_settings_names_them(tiny_config):
    simulate(tiny_config | {"run.num-rounds": 1}, 3)
    with pytest.raises(CheckpointError, match=r"train\.learning-rate was 0\.02, is 0\.5"):
        simulate(tiny_config | {"run.resume": True, "train.learning-rate": 0.5}, 3)


@pytest.mark.parametrize("changed", ["test rows", "classes", "nothing", "the list of classes"])
def test_resuming_on_other_data_is_noticed(changed: str, tiny_config, tmp_path: Path, caplog):
    table = pd.read_parquet(tiny_config["data.name"])
    table["label"] = table["label_name"]
    config = tiny_config | {"data.name": str(tmp_path / "own.parquet"), "run.num-rounds": 1}
    table.to_parquet(config["data.name"])
    simulate(config, 3)
    if changed == "classes":
        table["label"] = table["label"].replace("bad", "worse")
    elif changed == "test rows":
        table = table.drop(index=299)
    elif changed == "the list of classes":
        (tmp_path / "run" / "labels.json").write_text("[")
    table.to_parquet(config["data.name"])
    again = config | {"run.resume": True, "run.num-rounds": 2}
    if changed == "classes":
        with pytest.raises(CheckpointError, match=r"other classes \(bad, good\); .* has good, worse"):
            simulate(again, 3)
    else:
        simulate(again, 3)
    assert ("is not what it was in round 1" in caplog.text) == (changed == "test rows")


def test_a_run_does_not_overwrite_another(tiny_config):
    simulate(tiny_config | {"run.num-rounds": 1}, 3)
    with pytest.raises(ConfigError, match=r"run\.resume=true"):
        simulate(tiny_config, 3)


def nan(message: Message) -> Message:
    flat = from_arrays(message.content.array_records[STATE])
    name = next(n for n in flat if n.endswith("/A"))
    message.content.array_records[STATE] = to_arrays(flat | {name: torch.full_like(flat[name], float("nan"))})
    return message


def wrong_shape(message: Message) -> Message:
    flat = from_arrays(message.content.array_records[STATE])
    name = next(n for n in flat if n.endswith("/B"))
    message.content.array_records[STATE] = to_arrays(flat | {name: flat[name][:-1]})
    return message


def wrong_key(message: Message) -> Message:
    flat = from_arrays(message.content.array_records[STATE])
    message.content.array_records[STATE] = to_arrays({f"{name}x": tensor for name, tensor in flat.items()})
    return message


def negative_weight(message: Message) -> Message:
    metrics = {**message.content.metric_records[METRICS], "num-examples": -1}
    message.content.metric_records[METRICS] = MetricRecord(metrics)
    return message


def times(factor: float, *parts: str) -> Callable[[Message], Message]:
    def spoil(message: Message) -> Message:
        flat = from_arrays(message.content.array_records[STATE])
        flat = {name: t * factor if name.rpartition("/")[2] in parts else t for name, t in flat.items()}
        message.content.array_records[STATE] = to_arrays(flat)
        return message

    return spoil


negative_sigma = times(-1.0, "sigma")


@pytest.mark.parametrize("spoil", [nan, wrong_shape, wrong_key, negative_weight, negative_sigma, lambda message: None])
def test_a_bad_client_changes_nothing_for_the_others(spoil, tiny_config, tmp_path: Path):
    config = tiny_config | {"run.num-rounds": 1}
    bad = simulate(config, 3, tamper=lambda m, partition: spoil(m) if partition == 1 else m)
    config["run.output-dir"] = str(tmp_path / "without")
    without = simulate(config, 3, tamper=lambda m, partition: None if partition == 1 else m)
    assert equal(adapter(bad), adapter(without))
    row = training_rows(bad / "metrics.jsonl")[0]
    assert row["clients"] == 2
    if spoil(simulated_reply()) is not None:
        assert row["rejected"] == 1
        assert len(row["reasons"]) == 1


def simulated_reply() -> Message:
    from flwr.app import RecordDict

    from bora_fl.blocks import BlockFactors
    from bora_fl.wire.records import reply_content

    state = AdapterState({"q": BlockFactors(torch.ones(4, 1), torch.ones(2, 2, 1), torch.ones(1, 4))})
    content = reply_content(state, state, frozenset({"A", "B", "sigma"}), 1, {"num-examples": 1})
    request = Message(RecordDict(), dst_node_id=2, message_type="train")
    return Message(content, reply_to=request)


def test_when_no_client_is_of_use_the_run_fails_with_their_reasons(tiny_config):
    with pytest.raises(RunFailedError, match="not finite"):
        simulate(tiny_config, 3, tamper=lambda message, partition: nan(message))


def test_one_process_loads_the_model_and_the_data_once_for_all_its_clients(tiny_config):
    from bora_fl import data
    from bora_fl.client.site import base_loads

    config = tiny_config | {"run.seed": 77}  # no other test has loaded this one
    models_before, data_before = base_loads(), data.loads()
    simulate(config, 3)
    assert base_loads() - models_before == 1
    assert data.loads() - data_before <= 2  # the training split and the test split


def test_clients_of_different_ranks_train_together(tiny_config):
    config = tiny_config | {"strategy.name": "refactor", "adapter.rank": 4}
    folder = simulate(config, 3, node_configs={1: {"rank": 2}})
    row = training_rows(folder / "metrics.jsonl")[-1]
    assert [row["per_client"][c]["rank"] for c in "012"] == [4, 2, 4]
    assert row["rejected"] == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_adapters_federate(method: str, tiny_config):
    folder = simulate(tiny_config | {"adapter.method": method, "strategy.name": "fedavg"}, 3)
    assert training_rows(folder / "metrics.jsonl")[-1]["rejected"] == 0
    assert any((folder / "adapter").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter.num-blocks": 3}, ["adapter.num-blocks = 3", "divisors"]),
        ({"strategy.name": "fedavgg"}, ["strategy.name", "fedavgg", "fedavg"]),
        ({"data.name": "missing.parquet"}, ["data.name", "missing.parquet"]),
        ({"model.name": "embedded:nothing"}, ["model.name", "embedded:minilm"]),
        ({"adapter.target-modules": "nothing"}, ["adapter.target-modules", "nothing"]),
        ({"adapter.method": "loora"}, ["adapter.method", "loora", "lora"]),
        ({"data.text-column": "txt"}, ["data.text-column", "txt", "text"]),
        ({"data.partition-by": "shop"}, ["data.partition-by", "shop", "domain"]),
    ],
)
def test_a_wrong_setting_ends_in_one_readable_message(change, words: list[str], tiny_config):
    with pytest.raises((ConfigError, ValueError)) as error:
        simulate(tiny_config | change, 3)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_personal_factors_never_leave_the_client(tiny_config):
    seen = set()

    def watch(message: Message, partition: int) -> Message:
        seen.update(from_arrays(message.content.array_records[STATE]))
        return message

    folder = simulate(tiny_config | {"strategy.name": "fedsa"}, 3, tamper=watch)
    assert not any(name.endswith("/B") for name in seen)
    assert any(name.endswith("/A") for name in seen)
    shutil.rmtree(folder)


def test_a_client_whose_model_is_worse_on_held_out_examples_is_set_aside(tiny_config, tmp_path: Path):
    config = tiny_config | {"strategy.max-loss-increase": 0.5, "strategy.screening-examples": 20}

    def spoil(message: Message, partition: int) -> Message:
        if partition == 1:
            arrays = from_arrays(message.content.array_records[STATE])
            head = next(name for name in arrays if name.startswith("tensors/") and name.endswith("weight"))
            message.content[STATE] = to_arrays(arrays | {head: 300 * torch.randn_like(arrays[head])})
        return message

    spoiled = simulate(config, 3, tamper=spoil)
    row = training_rows(spoiled / "metrics.jsonl")[0]
    assert (row["clients"], row["rejected"]) == (2, 1)
    assert "strategy.max-loss-increase" in row["reasons"]["1"]
    without = config | {"run.output-dir": str(tmp_path / "without")}
    dropped = simulate(without, 3, tamper=lambda message, partition: None if partition == 1 else message)
    assert equal(adapter(spoiled), adapter(dropped))


def test_a_sigma_that_training_cannot_reach_is_no_obstacle_to_screening(tiny_config):
    config = tiny_config | {"strategy.max-loss-increase": 5.0, "strategy.screening-examples": 20, "run.num-rounds": 1}
    folder = simulate(config, 3, tamper=lambda m, partition: times(1.5, "sigma")(m) if partition == 1 else m)
    assert training_rows(folder / "metrics.jsonl")[0]["clients"] == 3


def test_a_merge_that_is_not_finite_changes_nothing(tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    merge = Aggregator.aggregate

    def overflow(self: Aggregator, state: ServerState, updates: list[ClientUpdate], round: int):
        merged, details = merge(self, state, updates, round)
        tensors = {name: torch.full_like(t, float("inf")) for name, t in merged.current.tensors.items()}
        return replace(merged, current=AdapterState(merged.current.layers, tensors)), details

    monkeypatch.setattr(Aggregator, "aggregate", overflow)
    folder = simulate(tiny_config | {"run.num-rounds": 1}, 3)
    assert "not finite" in training_rows(folder / "metrics.jsonl")[0]["reasons"]["merge"]
    assert all(bool(tensor.isfinite().all()) for tensor in adapter(folder).values())


def test_sites_with_data_of_their_own_train_on_all_of_it(tiny_config):
    folder = simulate(tiny_config | {"data.partition": "local", "run.num-rounds": 1}, 3)
    clients = training_rows(folder / "metrics.jsonl")[0]["per_client"]
    assert [clients[c]["num-examples"] + clients[c]["eval-examples"] for c in "012"] == [240] * 3
    assert not (folder / "partition.png").exists()
