"""Every field of every message that leaves a site, in every mode, against the table of docs/privacy.md."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from flwr.app import Context, Message, RecordDict

from bora_fl.client.app import app
from bora_fl.privacy.policy import Metric, Mode
from bora_fl.simulations.engine import InProcessGrid, simulate
from bora_fl.state import unflatten
from bora_fl.strategies.observer import RunFailedError
from bora_fl.wire.records import from_arrays, part_of
from bora_fl.wire.refusals import Code, Refusal
from bora_fl.wire.release import NAMED, EvaluationRelease, GramRelease, Release
from bora_fl.wire.schema import GRAMS, HEADS, METRICS, REPLY, STATE, refusal

PAGE = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"
MODES = get_args(Mode)
ABSENT = "stays"


def table() -> dict[tuple[str, str], dict[str, str]]:
    section = PAGE.read_text().partition("## What leaves a site")[2].partition("\n## ")[0]
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
    ]
    assert rows[0][:2] == ["message", "field"]
    assert set(rows[0][2:]) == set(MODES)
    found = {(row[0], row[1]): dict(zip(rows[0][2:], row[2:], strict=True)) for row in rows[2:]}
    assert len(found) == len(rows) - 2
    return found


def listed(message: str, mode: str, named: bool) -> set[str]:
    """The fields that the table lets leave."""
    return {
        field
        for (kind, field), cells in table().items()
        if kind == message and cells[mode] != ABSENT and (named or cells[mode] != NAMED or field == "num-examples")
    }


def fields_of(content: RecordDict) -> set[str]:
    """Names as in the table; of what the head is solved from each tensor."""
    found = set(content.array_records) - {HEADS}
    if HEADS in content.array_records:
        found |= {f"{HEADS}/{name}" for name in from_arrays(content.array_records[HEADS])}
    for name, record in [*content.config_records.items(), *content.metric_records.items()]:
        found |= {key if name in (REPLY, METRICS) else f"{name}/{key}" for key in record}
    return found


def protections(release: type) -> dict[str, str]:
    hints = get_type_hints(release, include_extras=True)
    return {name.replace("_", "-"): h.__metadata__[0] for name, h in hints.items() if hasattr(h, "__metadata__")}


@pytest.fixture
def config(tiny_config, tmp_path: Path):
    return tiny_config | {
        "privacy.epsilon": 50.0,
        "privacy.delta": 1e-3,
        "privacy.accountant": "rdp",
        "privacy.ledger-dir": str(tmp_path / "ledger"),
        "strategy.weighting": "uniform",
        "strategy.name": "ffa",
        "run.num-rounds": 1,
        "head.init": "auto",
    }


@pytest.fixture
def sent(config, tmp_path: Path):
    """Runs a federation and returns each message that left a site: (kind, content)."""

    def site(partition: int, metrics: Iterable[str]) -> dict:
        keys = {"data-set": f"tiny-{partition}", "data-path": config["data.name"], "models": ["*"], "modes": MODES}
        keys |= {"ledger-folder": str(tmp_path / "ledger"), "metrics": sorted(metrics)}
        bounds = [f"[{mode}]\nepsilon = 50.0\ndelta = 1e-3" for mode in ("record", "local", "client")]
        file = tmp_path / f"policy-{partition}.toml"
        file.write_text("\n".join([*(f"{key} = {json.dumps(value)}" for key, value in keys.items()), *bounds]))
        return {"policy": str(file)}

    def run(mode: str, metrics: Iterable[str] | None = None, **changes) -> list[tuple[str, RecordDict]]:
        seen = []

        def watch(reply: Message, partition: int) -> Message:
            assert reply.has_content()
            seen.append((reply.metadata.message_type, reply.content))
            return reply

        nodes = {p: site(p, metrics) for p in range(3)} if metrics is not None else {}
        changes = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
        simulate(config | {"privacy.mode": mode} | changes, 3, node_configs=nodes, tamper=watch)
        return seen

    return run


SUMS = {"none": "nothing", "record": "the noise on the sums"}


def test_the_types_say_what_the_table_says():
    releases = {release.mode: protections(release) for release in get_args(Release)}
    assert set(releases) == set(MODES)
    wire = {"schema", "round"}
    for mode, fields in releases.items():
        assert {
            f: p
            for (kind, f), cells in table().items()
            if kind == "train" and f not in wire and (p := cells[mode]) != ABSENT
        } == fields
    assert protections(EvaluationRelease) == {
        f: cells["none"] for (kind, f), cells in table().items() if kind == "evaluate"
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("named", [False, True])
def test_a_train_reply_holds_what_the_table_lists(mode: str, named: bool, sent):
    seen = sent(mode, get_args(Metric) if named else None)
    trained = [content for kind, content in seen if kind == "train"]
    assert len(trained) == 3
    for content in trained:
        assert fields_of(content) == listed("train", mode, named or mode == "none")
        assert {part_of(name) for name in from_arrays(content.array_records[STATE])} == {"B", "scaling", "tensors"}
        if mode in ("record", "local") or (mode == "client" and not named):
            assert content.metric_records[METRICS]["num-examples"] == 1


def test_gram_matrices_leave_beside_the_state_where_they_are_asked_for(sent):
    trained = [content for kind, content in sent("none", strategy__name="regmean") if kind == "train"]
    assert len(trained) == 3
    assert all(fields_of(c) == listed("train", "none", True) | listed("grams", "none", True) for c in trained)
    layers = unflatten(from_arrays(trained[0].array_records[STATE])).layers
    assert all(from_arrays(content.array_records[GRAMS]).keys() == layers.keys() for content in trained)
    (cells,) = (cells for (kind, _), cells in table().items() if kind == "grams")
    assert protections(GramRelease)["grams"] == cells["none"]
    assert all(cells[mode] == ABSENT for mode in MODES[1:])


@pytest.mark.parametrize("mode", MODES)
def test_replies_for_the_head_hold_what_the_table_lists(mode: str, sent):
    seen = sent(mode)
    sums = [content for kind, content in seen if kind == "query.head_statistics"]
    losses = [content for kind, content in seen if kind == "query.head_losses"]
    assert len(sums) == {"none": 6, "record": 3}.get(mode, 0)  # before round 1 and, without privacy, at the end
    assert len(losses) == (6 if mode == "none" else 0)
    assert all(fields_of(content) == listed("head-statistics", mode, True) for content in sums)
    assert all(fields_of(content) == listed("head-losses", mode, True) for content in losses)
    tensors = {cells[mode] for (kind, f), cells in table().items() if kind == "head-statistics" and f.startswith(HEADS)}
    assert tensors == {SUMS.get(mode, ABSENT)}
    assert all(cells[m] == ABSENT for (k, f), cells in table().items() if k == "head-losses" for m in MODES[1:])


@pytest.mark.parametrize(
    "changes", [{"privacy.mode": "local"}, {"privacy.mode": "client"}, {"privacy.secure-aggregation": True}]
)
def test_a_site_that_is_asked_for_sums_that_no_mechanism_protects_refuses(changes: dict, config):
    grid = InProcessGrid(app, 1, config | changes)
    for kind in ("query.head_statistics", "query.head_losses"):
        (reply,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=2, message_type=kind)])
        assert "refused" in reply.content.config_records[REPLY]
        assert not reply.content.array_records


@pytest.mark.parametrize("mode", ["none", "client"])
def test_an_evaluation_reply_holds_what_the_table_lists(mode: str, sent):
    seen = sent(mode, get_args(Metric), strategy__fraction_evaluate=1.0)
    exact = [content for kind, content in seen if kind == "evaluate"]
    assert len(exact) == 3
    assert all(fields_of(content) == listed("evaluate", mode, True) for content in exact)


@pytest.mark.parametrize("mode", ["none", "record", "local"])
def test_a_masked_reply_holds_what_the_table_lists(mode: str, sent):
    seen = sent(mode, privacy__secure_aggregation=True)
    fields = set().union(*(fields_of(content) for _, content in seen))
    assert fields == listed("masked", mode, True)
    for _, content in seen:
        assert not any(array.data for record in content.array_records.values() for array in record.values())
        assert content.metric_records.get("fitres.num_examples", {"num_examples": 1})["num_examples"] == 1
        assert not content.config_records.get("fitres.status", {"message": ""})["message"]


@pytest.mark.parametrize("mode", MODES)
def test_queries_and_refusals_hold_what_the_table_lists(mode: str, config, tmp_path: Path):
    broken = config | {"privacy.mode": mode, "data.name": str(tmp_path / "missing.csv")}
    grid = InProcessGrid(app, 1, broken, {0: {"name": "berlin"}})
    (query,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=2, message_type="query")])
    assert fields_of(query.content) == listed("query", mode, True)
    for kind in ("train", "evaluate"):
        (refused,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=2, message_type=kind)])
        assert fields_of(refused.content) == listed("refusal", mode, True) - {"folds-held"}
        assert refused.content.config_records[REPLY]["refused"] in list(Code)
    assert fields_of(refusal(Refusal(Code.FOLDS_MISSING, folds_held=2))) == listed("refusal", mode, True)


def test_under_secure_aggregation_a_refusal_is_code_id_and_sentence(config, tmp_path: Path):
    broken = config | {"privacy.secure-aggregation": True, "data.name": str(tmp_path / "missing.csv")}
    grid = InProcessGrid(app, 1, broken)
    for kind in ("train", "evaluate"):
        (reply,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=2, message_type=kind)])
        if kind == "evaluate":
            assert reply.content.config_records[REPLY]["refused"] == Code.EVALUATION_WITHHELD
            continue
        code, error_id = reply.error.reason.partition(":")[0].split()
        assert reply.error.reason == Refusal(Code.of(code), error_id).line()


def test_no_handler_raises_whatever_it_is_sent(config):
    """What a handler raises Flower sends as text."""
    for run_config in ({}, {"no.such": 1}, {"privacy.secure-aggregation": "maybe"}, config):
        context = Context(1, 2, {"partition-id": "x"}, RecordDict(), run_config)
        for kind in ("train", "evaluate", "query"):
            reply = app(Message(RecordDict(), dst_node_id=2, message_type=kind), context)
            assert reply.content.config_records[REPLY]["refused"] in list(Code)


def test_the_number_of_examples_does_not_change_a_private_reply(sent):
    """Noise and spent ε follow from the sampling rate: with them, one record more or less could be read off."""
    seen = sent("record", data__partition="linear")
    for kind in ("train", "query.head_statistics"):
        metrics = [dict(content.metric_records[METRICS]) for found, content in seen if found == kind]
        assert len(metrics) == 3
        assert len({json.dumps({k: v for k, v in m.items() if k != "partition"}) for m in metrics}) == 1


def test_a_run_without_a_usable_reply_names_codes(config, tmp_path: Path):
    from bora_fl.client import job

    broken = config | {"privacy.mode": "none"}
    with pytest.raises(
        RunFailedError, match=r"node-config-invalid|policy-invalid: .*error [0-9a-f]{8} in the site's log"
    ):
        simulate(broken, 1, node_configs={0: {"policy": str(tmp_path / "missing.toml")}})
    assert job.perform("train", RecordDict(), Context(1, 2, {}, RecordDict(), broken)).config_records[REPLY]["refused"]
