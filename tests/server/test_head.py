"""The closed-form head over a whole federation: the same however the data is split, before round 1 and at the end."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import load_file

from bora_fl import load
from bora_fl.client.app import app
from bora_fl.config import ConfigError, parse
from bora_fl.data import test_data as held_out
from bora_fl.evaluate import evaluate
from bora_fl.heads import lda
from bora_fl.report import read_rows, training_rows
from bora_fl.server.checkpoint import load_newest
from bora_fl.simulations.engine import InProcessGrid, simulate
from bora_fl.strategies import head as strategy_head
from bora_fl.strategies.head import LOSSES, STATISTICS, HeadLayout
from bora_fl.strategies.observer import RunFailedError
from bora_fl.strategies.secure_aggregation import SecureMean
from bora_fl.wire.records import from_arrays, to_arrays
from bora_fl.wire.schema import HEADS, METRICS, REPLY


@pytest.fixture
def solved(tiny_config):
    return tiny_config | {"head.init": "closed-form", "run.num-rounds": 0, "data.evaluation-fraction": 0.0}


def head(folder) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if "classifier" in name}


def test_no_split_changes_the_head(solved, tmp_path):
    """Predictions are compared: the untrained model's features vary so little that its weights have few digits."""
    one = simulate(solved | {"data.partition": "iid", "run.output-dir": str(tmp_path / "one")}, 1)
    wanted = read_rows(one / "metrics.jsonl")[0]
    for name, split in {"natural": {}, "dirichlet": {"data.partition": "dirichlet", "data.alpha": 0.1}}.items():
        folder = simulate(solved | split | {"run.output-dir": str(tmp_path / name)}, 3)
        row = read_rows(folder / "metrics.jsonl")[0]
        assert row["accuracy"] == wanted["accuracy"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=2e-2)


def test_a_run_without_rounds_is_a_federation_of_one_exchange(solved):
    folder = simulate(solved, 3)
    (row,) = read_rows(folder / "metrics.jsonl")
    assert (row["round"], row["clients"], row["rejected"], row["evaluated"]) == (0, 3, 0, "central")
    assert row["accuracy"] > 0.9  # the random head of the tiny model says .5
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert row["bytes_up"] > 3 * 4 * (2 * 16 + 16 * 17 // 2)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"privacy.secure-aggregation": True, "privacy.max-examples": 100},
        {"privacy.mode": "record", "privacy.epsilon": 1e4, "privacy.delta": 1e-3, "strategy.weighting": "uniform"},
    ],
    ids=["plain", "masked", "private"],
)
def test_wide_features_are_summed_over_fewer_directions(solved, tmp_path, how):
    def at(width: int):
        own = {"head.max-width": width, "run.output-dir": str(tmp_path / f"{width}")}
        own["privacy.ledger-dir"] = str(tmp_path / f"ledger-{width}")
        return read_rows(simulate(solved | how | own, 3) / "metrics.jsonl")[0]

    whole, few = at(16), at(8)
    assert few["head"]
    assert few["rejected"] == 0
    if "privacy.secure-aggregation" not in how:  # the tiny model's features vary less than masking rounds
        assert few["accuracy"] >= whole["accuracy"] - 0.1
    assert few["bytes_up"] < whole["bytes_up"]


def test_round_zero_is_the_first_row_and_training_goes_on_from_it(tiny_config):
    rows = read_rows(simulate(tiny_config | {"head.init": "auto"}, 3) / "metrics.jsonl")
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["accuracy"] > 0.9
    assert rows[0]["head"].startswith("x")
    assert rows[3]["head"]
    assert [rows[1]["head"], rows[2]["head"]] == ["", ""]


def test_a_random_head_has_a_round_zero_too(tiny_config):
    rows = read_rows(simulate(tiny_config | {"run.num-rounds": 1}, 3) / "metrics.jsonl")
    assert [(row["round"], row["head"]) for row in rows] == [(0, ""), (1, "")]
    assert rows[0]["loss"] is not None


def test_the_head_that_is_kept_at_the_end_has_the_least_held_out_loss(tiny_config):
    """Training with an absurd rate spoils the head; solving it again mends that, unless it is told not to."""
    spoiled = tiny_config | {"head.init": "auto", "train.head-learning-rate": 50.0, "data.evaluation-fraction": 0.3}
    spoiled["run.keep-best"] = False
    mended = read_rows(simulate(spoiled, 3) / "metrics.jsonl")
    never = {"head.solve-again": "never", "run.output-dir": f"{tiny_config['run.output-dir']}-never"}
    left = read_rows(simulate(spoiled | never, 3) / "metrics.jsonl")
    assert mended[2]["loss"] == left[2]["loss"]
    assert mended[3]["loss"] < left[3]["loss"]
    assert mended[3]["head"] != "trained"
    assert left[3]["head"] == ""


def test_an_interrupted_run_does_not_solve_again_and_ends_in_the_same_adapter(tiny_config, tmp_path):
    config = tiny_config | {"head.init": "auto"}
    whole = simulate(config | {"run.output-dir": str(tmp_path / "whole")}, 3)

    class Interrupted(BaseException):
        pass

    asked = []

    def stop_in_round_one(reply: Message, partition: int) -> Message:
        asked.append(reply.metadata.message_type)
        if reply.metadata.message_type == "train":
            raise Interrupted
        return reply

    torn = config | {"run.output-dir": str(tmp_path / "torn")}
    with pytest.raises(Interrupted):
        simulate(torn, 3, tamper=stop_in_round_one)
    assert load_newest(tmp_path / "torn" / "checkpoints", parse(torn).flat()).round == 0
    before = asked.count(STATISTICS)

    def watch(reply: Message, partition: int) -> Message:
        asked.append(reply.metadata.message_type)
        return reply

    simulate(torn | {"run.resume": True}, 3, tamper=watch)
    assert (before, asked.count(STATISTICS)) == (3, 6)  # three before round 1, three after the last
    for name, tensor in load_file(whole / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "torn" / "adapter" / "adapter_model.safetensors")[name], tensor)


@pytest.mark.parametrize("lie", ["counts", "gram", "nan", "shape", "huge"])
def test_a_lie_about_the_sums_is_rejected_and_the_others_count(lie: str, solved, tmp_path):
    def tamper(reply: Message, partition: int) -> Message:
        if partition != 1 or reply.metadata.message_type != STATISTICS:
            return reply
        flat = copy.deepcopy(from_arrays(reply.content.array_records[HEADS]))
        if lie == "counts":
            flat["counts"] -= 100
        elif lie == "gram":
            flat["gram"] = -flat["gram"]
        elif lie == "nan":
            flat["sums"][0, 0] = float("nan")
        elif lie == "shape":
            flat["sums"] = flat["sums"][:, :-1].contiguous()
        else:
            flat = {name: tensor * 1e6 for name, tensor in flat.items()}
        reply.content[HEADS] = to_arrays(flat)
        return reply

    folder = simulate(solved, 3, tamper=tamper)
    (row,) = read_rows(folder / "metrics.jsonl")
    assert (row["clients"], row["rejected"]) == (2, 1)
    assert row["accuracy"] > 0.9


def test_a_lie_about_noised_sums_is_rejected_or_bounded(solved, tmp_path):
    """Under record-level privacy: counts below 0, and a million times the examples."""
    factors = {0: -1e6, 1: 1e6}

    def tamper(reply: Message, partition: int) -> Message:
        if partition in factors and reply.metadata.message_type == STATISTICS:
            flat = from_arrays(reply.content.array_records[HEADS])
            reply.content[HEADS] = to_arrays({name: t * factors[partition] for name, t in flat.items()})
        return reply

    private = {"privacy.mode": "record", "privacy.delta": 1e-3, "privacy.accountant": "rdp", "privacy.epsilon": 8.0}
    private |= {"strategy.weighting": "uniform", "privacy.ledger-dir": str(tmp_path / "ledger")}
    (row,) = read_rows(simulate(solved | private, 3, tamper=tamper) / "metrics.jsonl")
    assert row["head"] == "solved"
    assert 1 <= row["rejected"] <= 2
    assert row["clients"] == 3 - row["rejected"]
    assert all("noised" in reason for reason in row["reasons"].values())


@pytest.mark.parametrize("lie", [{"clip-norm": float("nan")}, {"clip-norm": 0.0}, {"num-classes": 1}])
def test_a_server_that_asks_for_sums_which_some_records_spoil_is_refused(lie: dict, solved, tmp_path, monkeypatch):
    """A norm of NaN told which classes have records, and fewer classes than there are whether any record is beyond."""
    honest = HeadLayout.request
    monkeypatch.setattr(HeadLayout, "request", lambda *a: ConfigRecord({**honest(*a), **lie}))
    private = {"privacy.mode": "record", "privacy.delta": 1e-3, "privacy.accountant": "rdp"}
    private |= {"strategy.weighting": "uniform", "privacy.ledger-dir": str(tmp_path / "ledger")}
    with pytest.raises(RunFailedError, match="message-invalid"):
        simulate(solved | private, 1)
    assert not list((tmp_path / "ledger").glob("*.json"))


def test_losses_that_are_none_do_not_choose_the_head(tiny_config):
    def tamper(reply: Message, partition: int) -> Message:
        if partition == 0 and reply.metadata.message_type == LOSSES:
            losses = reply.content.metric_records["metrics"]["head-losses"]
            reply.content.metric_records["metrics"]["head-losses"] = [float("nan") for _ in losses]
        return reply

    rows = read_rows(simulate(tiny_config | {"head.init": "auto"}, 3, tamper=tamper) / "metrics.jsonl")
    assert rows[0]["rejected"] == 1
    assert rows[0]["head"]


@pytest.mark.parametrize(
    ("mode", "value", "wanted"),
    [
        ("none", 0.0, "no finite head"),
        ("record", 1e100, "noised sums are longer"),
        ("record", 1e300, "features that are too large"),
    ],
)
def test_sums_from_which_no_head_can_be_solved_do_not_end_the_run(
    mode: str, value: float, wanted: str, tiny_config, tmp_path
):
    def tamper(reply: Message, partition: int) -> Message:
        if reply.metadata.message_type == STATISTICS:
            flat = from_arrays(reply.content.array_records[HEADS])
            reply.content[HEADS] = to_arrays({name: torch.full_like(t.double(), value) for name, t in flat.items()})
        return reply

    private = {
        "privacy.mode": mode,
        "privacy.delta": 1e-3,
        "privacy.accountant": "rdp",
        "strategy.weighting": "uniform",
    }
    private["privacy.ledger-dir"] = str(tmp_path / "ledger")
    rows = read_rows(simulate(tiny_config | private | {"head.init": "auto"}, 1, tamper=tamper) / "metrics.jsonl")
    assert [(row["round"], row["head"]) for row in rows] == [(0, ""), (1, ""), (2, ""), (3, "")]
    assert any(wanted in reason for reason in rows[0]["reasons"].values())


def test_one_client_s_claim_does_not_choose_the_head(tiny_config):
    """It says that the worst scale is perfect on a million examples."""

    def tamper(reply: Message, partition: int) -> Message:
        if partition == 0 and reply.metadata.message_type == LOSSES:
            metrics = reply.content.metric_records["metrics"]
            metrics["head-losses"] = [9.0] * (len(metrics["head-losses"]) - 1) + [0.0]
            metrics["eval-examples"] = 1_000_000
        return reply

    config = tiny_config | {"head.init": "auto", "run.num-rounds": 1}
    (zero, _) = read_rows(simulate(config, 3, tamper=tamper) / "metrics.jsonl")
    assert zero["head"] != "x0.25"
    assert "max-weight-ratio" in "".join(zero["reasons"].values())


def test_sites_that_withhold_their_sums_leave_the_head_as_it_is(solved, tiny_config):
    def refuse(reply: Message, partition: int) -> Message | None:
        return None if reply.metadata.message_type == STATISTICS else reply

    with pytest.raises(RunFailedError, match="not one usable reply"):
        simulate(solved, 3, tamper=refuse)
    config = tiny_config | {"head.init": "auto", "run.num-rounds": 1, "run.output-dir": f"{solved['run.output-dir']}-2"}
    rows = read_rows(simulate(config, 3, tamper=refuse) / "metrics.jsonl")
    assert [row["head"] for row in rows] == ["", ""]
    assert rows[1]["clients"] == 3


def test_a_head_that_is_solved_and_not_trained_stays_as_it_was_solved(tiny_config):
    frozen = {
        "head.init": "auto",
        "adapter.train-head": False,
        "head.solve-again": "never",
        "strategy.name": "refactor",
        "run.keep-best": False,
    }
    folder = simulate(tiny_config | frozen, 3)
    checkpoints = load_newest(folder / "checkpoints", parse(tiny_config | frozen).flat())
    start = simulate(tiny_config | frozen | {"run.num-rounds": 0, "run.output-dir": f"{folder}-zero"}, 3)
    for name, tensor in checkpoints.state.current.tensors.items():
        assert torch.equal(tensor, head(start)[name.rpartition(".")[2]])
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[3]["loss"] != rows[0]["loss"]


def test_under_record_privacy_the_release_and_the_rounds_share_the_budget(solved, tmp_path):
    from bora_fl.privacy.ledger import Ledger

    private = solved | {
        "privacy.mode": "record",
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-3,
        "privacy.accountant": "rdp",
        "privacy.ledger-dir": str(tmp_path / "ledger"),
        "strategy.weighting": "uniform",
        "train.local-steps": 2,
    }
    (row,) = read_rows(simulate(private, 3) / "metrics.jsonl")
    assert row["head"] == "solved"
    rounds = private | {"run.num-rounds": 2, "privacy.ledger-dir": str(tmp_path / "again")}
    rows = read_rows(simulate(rounds | {"run.output-dir": str(tmp_path / "rounds")}, 3) / "metrics.jsonl")
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[2]["head"] == ""  # solving again would cost
    for folder, entries in (("ledger", 1), ("again", 3)):
        files = sorted((tmp_path / folder).glob("*.json"))
        assert len(files) == 3
        for file in files:
            budget = parse(private).privacy
            ledger = Ledger.open(
                file.parent, run_id="r", dataset_fingerprint=file.stem, budget=_budget(budget), accountant="rdp"
            )
            assert sum(1 for _ in ledger.history()) <= entries
            assert 7.0 < ledger.epsilon() <= 8.0


def _budget(privacy):
    from bora_fl.privacy.accounting import Budget

    return Budget(privacy.epsilon, privacy.delta)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy.mode": "local", "strategy.weighting": "uniform"}, r"head\.init = 'closed-form' with privacy\.mode"),
        ({"model.task": "causal-lm"}, r"head\.init = 'closed-form' with model\.task"),
        ({"head.init": "random"}, r"run\.num-rounds = 0"),
    ],
)
def test_what_cannot_be_solved_is_said_before_anything_starts(changes: dict, words: str, solved):
    with pytest.raises(ConfigError, match=words):
        parse(solved | changes)


@pytest.mark.parametrize("mode", ["none", "record"])
def test_under_secure_aggregation_the_head_is_that_of_the_sum_and_no_sum_is_seen(
    tiny_config, tmp_path, mode: str, monkeypatch: pytest.MonkeyPatch
):
    seen, solved_from = [], []
    monkeypatch.setattr(strategy_head, "lda", lambda sums, **options: solved_from.append(sums) or lda(sums, **options))
    plain = tiny_config | {"head.init": "auto", "run.num-rounds": 0, "privacy.mode": mode}
    plain |= {"privacy.delta": 1e-3, "strategy.weighting": "uniform", "privacy.epsilon": 1e4}
    node = InProcessGrid(app, 1, parse(plain | {"privacy.secure-aggregation": True}).flat())
    for asked in (STATISTICS, LOSSES):
        (reply,) = node.send_and_receive([Message(RecordDict(), dst_node_id=2, message_type=asked)])
        assert reply.content.config_records[REPLY]["refused"] == "protocol-mismatch"
    masked = {"privacy.secure-aggregation": True, "privacy.max-examples": 100}
    masked["run.output-dir"] = str(tmp_path / "masked")
    secure = simulate(plain | masked, 3, tamper=lambda reply, _: seen.append(reply) or reply)
    (row,) = read_rows(secure / "metrics.jsonl")
    assert (row["clients"], row["rejected"]) == (3, 0)
    assert row["head"]
    assert not any(HEADS in reply.content.array_records or reply.content.metric_records.get(METRICS) for reply in seen)
    if mode == "none":  # noise is drawn anew
        simulate(plain, 3)
        summed, expected = (sums.to_vector() for sums in solved_from)
        assert float((summed - expected).abs().max()) < 1e-4  # of sums over 216 examples


def test_a_class_that_nobody_has_is_none_after_masking_either():
    found = SecureMean([np.array([7.2e-5, -1e-9, 0.3, 3e-9, 0.5])], frozenset({1, 2}), {}, 0)
    sums = strategy_head._unmasked(found, (2, 1), 10_000, exact=True)
    assert sums is not None
    assert sums.counts.tolist() == [1.0, 0.0]
    assert sums.sums.flatten().tolist() == [6000.0, 0.0]


def test_a_sentence_encoders_run_says_what_its_head_read_resumes_and_loads(tiny_config, tiny_model: Path, tmp_path):
    """`auto` is settled once: what was saved must not be settled anew, by another rule, when it is read."""
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_model, folder)
    (folder / "1_Pooling").mkdir()
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    tiny_config |= {"model.name": str(folder), "run.num-rounds": 1, "head.init": "auto"}
    run = simulate(tiny_config, 3)
    assert json.loads((run / "config.json").read_text())["model.pooling"] == "layers"
    assert "layers of the token states" in (run / "adapter" / "README.md").read_text()
    loaded, tokenizer = load(run)
    assert loaded.base_model.model.classifier.modules_to_save["default"].in_features == 3 * 16
    last = training_rows(run / "metrics.jsonl")[-1]
    settings = parse(json.loads((run / "config.json").read_text()))
    test = held_out(settings.data, settings.model, tokenizer)
    assert test is not None
    assert evaluate(loaded, test, 64).loss == pytest.approx(last["loss"], abs=1e-4)
    simulate(tiny_config | {"run.num-rounds": 2, "run.resume": True}, 3)
    assert training_rows(run / "metrics.jsonl")[-1]["round"] == 2
