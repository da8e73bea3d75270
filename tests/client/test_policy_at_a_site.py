"""Whole federations at sites with a policy: what a run could do before, and no longer can."""

import json
import logging
import re
import time
from pathlib import Path

import pandas as pd
import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from bora_fl.client import job
from bora_fl.config import ConfigError, parse
from bora_fl.privacy.accounting import epsilon
from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.observer import RunFailedError
from bora_fl.wire.schema import REPLY, SCHEMA


@pytest.fixture
def private(tiny_config):
    return tiny_config | {
        "privacy.mode": "record",
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-3,
        "privacy.accountant": "rdp",
        "strategy.name": "ffa",
        "strategy.weighting": "uniform",
        "strategy.min-nodes": 1,
        "run.num-rounds": 1,
    }


@pytest.fixture
def policy(tiny_data: Path, tiny_model: Path, tmp_path: Path):
    """Writes a policy for the tiny data, with changes, and names it to a node."""

    def write(name: str = "policy.toml", bounds: str = "epsilon = 8.0\ndelta = 1e-3", **keys) -> dict:
        values = {"data-set": "tiny", "data-path": str(tiny_data), "models": [str(tiny_model)]}
        values |= {"ledger-folder": str(tmp_path / "ledger")} | {k.replace("_", "-"): v for k, v in keys.items()}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        (tmp_path / name).write_text("\n".join([*lines, "[record]", bounds]))
        return {0: {"policy": str(tmp_path / name)}}

    return write


def refused(config, nodes, **changes) -> str:
    """The reasons of a run that fails, in an output folder of its own."""
    folder = Path(str(config["run.output-dir"]))
    fresh = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}")
    with pytest.raises(RunFailedError) as failed:
        simulate(config | {"run.output-dir": str(fresh)} | changes, 1, node_configs=nodes)
    return str(failed.value)


def spent(folder: Path) -> float:
    entries = [entry for file in folder.glob("set-*.json") for entry in json.loads(file.read_text())["entries"]]
    return epsilon([(e["noise_multiplier"], e["sample_rate"], e["steps"]) for e in entries], 1e-3, "rdp")


def test_no_run_config_gets_past_a_spent_budget(private, policy, tmp_path: Path):
    """With the budget used up, another mode trained without noise, and another ledger folder had the budget anew."""
    nodes, elsewhere = policy(), {"run.output-dir": str(tmp_path / "again")}
    simulate(private, 1, node_configs=nodes)
    assert 7.0 < spent(tmp_path / "ledger") <= 8.0
    again = private | elsewhere
    assert "budget-exceeded" in refused(again, nodes)
    assert "budget-exceeded" in refused(again, nodes, **{"privacy.ledger-dir": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()
    assert "policy-mode" in refused(again, nodes, **{"privacy.mode": "none"})
    assert "policy-budget" in refused(again, nodes, **{"privacy.epsilon": 49.9})
    assert spent(tmp_path / "ledger") <= 8.0


def test_no_change_of_the_data_makes_a_fresh_budget(private, policy, tiny_data: Path, tmp_path: Path):
    """One appended row, a second file, another partition: each was a ledger of its own."""
    simulate(private, 1, node_configs=policy())
    grown = tmp_path / "grown.parquet"
    frame = pd.read_parquet(tiny_data)
    pd.concat([frame, frame.iloc[:1]]).to_parquet(grown)
    again = private | {"run.output-dir": str(tmp_path / "again")}
    assert "budget-exceeded" in refused(again, policy(data_path=str(grown)))
    second = {"partition-id": 1, "num-partitions": 3}
    assert "budget-exceeded" in refused(again, {0: policy()[0] | second})


def test_a_data_set_under_another_name_is_warned_of(private, policy, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    simulate(private, 1, node_configs=policy())
    assert "give both the same name" not in caplog.text
    renamed = policy(data_set="other")
    simulate(private | {"run.output-dir": str(tmp_path / "again")}, 1, node_configs=renamed)
    assert "about 100.0 % of the records of data-set = 'other'" in caplog.text
    assert "set-tiny" in caplog.text


def test_the_site_s_data_is_trained_on_not_the_run_s(private, policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    real = job.site
    monkeypatch.setattr(job, "site", lambda settings, mesh=None: (seen.append(settings.data.name), real(settings))[1])
    other = tmp_path / "other.parquet"
    pd.read_parquet(private["data.name"]).to_parquet(other)
    simulate(private | {"data.name": str(other)}, 1, node_configs=policy())
    assert seen == [private["data.name"]]


@pytest.mark.parametrize("change", [{"epsilom": 1.0}, {"models": "not a list"}])
def test_a_policy_that_cannot_be_used_refuses_to_train(change: dict, private, policy, tmp_path: Path):
    assert "policy-invalid" in refused(private, policy(**change))
    assert "policy-invalid" in refused(private, {0: {"policy": str(tmp_path / "missing.toml")}})
    assert not (tmp_path / "ledger").exists()


def test_too_few_records_for_delta_are_refused_with_the_policy_s_code(private, policy, tmp_path: Path):
    large = policy(bounds="epsilon = 8.0\ndelta = 0.1")
    message = refused(private, large)
    assert "policy-budget" in message
    assert not list((tmp_path / "ledger").glob("set-*.json"))


def test_a_message_s_policy_yields_to_the_worker_s(private, policy, tmp_path: Path):
    lenient = policy("message.toml", modes=["none"])[0]
    strict = policy("own.toml")
    context = Context(
        1, 2, {"partition-id": 0, "num-partitions": 1} | lenient, RecordDict(), private | {"privacy.mode": "none"}
    )
    reply = job.perform("train", RecordDict(), context, policy_file=Path(strict[0]["policy"]))
    assert reply.config_records[REPLY]["refused"] == "policy-mode"
    assert job.perform("train", RecordDict(), context).config_records[REPLY]["refused"] == "schema-mismatch"


def test_replies_and_refusals_leave_on_the_site_s_schedule(private, policy):
    nodes = policy(reply_not_before=1.0)[0]
    context = Context(
        1, 2, {"partition-id": 0, "num-partitions": 1} | nodes, RecordDict(), private | {"privacy.mode": "none"}
    )
    started = time.monotonic()
    assert job.perform("train", RecordDict(), context).config_records[REPLY]["refused"] == "policy-mode"
    assert 1.0 <= time.monotonic() - started < 1.5


def test_the_numbers_that_the_site_withholds_do_not_leave_under_none(tiny_config, policy):
    nodes = policy(modes=["none"], metrics=["train-loss"])
    row = training_rows(simulate(tiny_config | {"run.num-rounds": 1}, 1, node_configs=nodes) / "metrics.jsonl")[0]
    assert set(row["per_client"]["0"]) == {"partition", "rank", "num-examples", "train-loss"}
    assert row["per_client"]["0"]["num-examples"] == 1


SECRET = "Anna Schmidt F32.1"


@pytest.mark.parametrize("mode", ["none", "client", "record", "local", "secure"])
def test_a_malformed_row_does_not_leave(mode: str, private, tmp_path: Path, caplog: pytest.LogCaptureFixture, policy):
    """It came back whole, and stood in the server's log and in metrics.jsonl."""
    table = tmp_path / "patients.csv"
    table.write_text(f'text,label,split\nfine,0,train\n"{SECRET}",1,train,one cell too many\n')
    config = private | {"privacy.mode": "none" if mode == "secure" else mode}
    config |= {"privacy.secure-aggregation": mode == "secure", "strategy.min-replies": 1}
    nodes = policy(modes=["none", "client", "record", "local"], data_path=str(table))
    (tmp_path / "policy.toml").write_text(
        (tmp_path / "policy.toml").read_text()
        + "".join(f"\n[{mode}]\nepsilon = 8.0\ndelta = 1e-3" for mode in ("local", "client"))
    )
    seen = []

    def watch(reply, partition: int):
        seen.append(str(reply.content) if reply.has_content() else reply.error.reason)
        return reply

    with pytest.raises(RunFailedError) as failed, caplog.at_level(logging.DEBUG):
        simulate(config, 3, node_configs=dict.fromkeys(range(3), nodes[0]), tamper=watch)
    assert "data-unreadable" in str(failed.value)
    assert seen
    at_the_server = [r.getMessage() for r in caplog.records if not r.name.startswith("bora_fl.client")]
    for text in [str(failed.value), *seen, *at_the_server]:
        assert SECRET not in text
    at_the_site = "".join(r.getMessage() for r in caplog.records if r.name == "bora_fl.client.refusing")
    assert SECRET in at_the_site
    (error_id,) = set(re.findall("[0-9a-f]{8}", str(failed.value).partition(";")[0]))
    assert error_id in at_the_site


@pytest.mark.parametrize("mode", ["record", "local"])
def test_exact_scores_are_refused_at_the_site(mode: str, private):
    context = Context(1, 2, {"partition-id": 0, "num-partitions": 1}, RecordDict(), private | {"privacy.mode": mode})
    reply = job.perform("evaluate", RecordDict(), context)
    assert {k: v for k, v in reply.config_records[REPLY].items() if k != "error-id"} == {
        "schema": SCHEMA,
        "refused": "evaluation-withheld",
    }
    assert not reply.metric_records


def test_a_training_that_diverges_under_local_privacy_sends_noise(
    private, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """That the loss became nan, and in which step, depends on the records."""

    def diverge(*_, **__):
        raise FloatingPointError("the loss became nan in step 2 of 4")

    monkeypatch.setattr("bora_fl.client.round.train", diverge)
    config = private | {"privacy.mode": "local", "privacy.ledger-dir": str(tmp_path / "ledger")}
    row = training_rows(simulate(config, 3) / "metrics.jsonl")[0]
    assert (row["clients"], row["rejected"]) == (3, 0)


def test_under_record_privacy_every_failure_of_training_has_one_code(
    private, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail(*_, **__):
        raise RuntimeError(f"an example of 4,711 tokens: {SECRET}")

    monkeypatch.setattr("bora_fl.client.dpsgd.train_privately", fail)
    config = private | {"privacy.ledger-dir": str(tmp_path / "ledger")}
    with pytest.raises(RunFailedError, match="training-failed") as failed:
        simulate(config, 3)
    assert SECRET not in str(failed.value)


def test_weights_and_evaluation_rounds_that_would_tell_of_the_records_are_refused(private):
    for key, value in (("strategy.weighting", "examples"), ("strategy.fraction-evaluate", 1.0)):
        with pytest.raises(ConfigError, match=key):
            parse(private | {key: value})


def test_a_query_is_answered_with_the_node_config_alone(private):
    from flwr.app import Message
    from flwr.supercore.task_identity import TaskIdentity

    from bora_fl.client.app import app

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    context = Context(1, 2, {"partition-id": 0, "num-partitions": "many"}, RecordDict(), private)
    reply = app(Message(RecordDict(), dst_node_id=2, message_type="query"), context)
    assert reply.content.config_records[REPLY]["refused"] == "node-config-invalid"
    assert isinstance(reply.content.config_records[REPLY], ConfigRecord)
