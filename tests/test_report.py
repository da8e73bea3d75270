"""What a round's report says, and what of it reaches metrics.jsonl."""

import json

import pytest

from bora_fl.report import (
    ClientMetrics,
    Evaluation,
    RoundReport,
    append_row,
    drop_rows_after,
    epsilon_of,
    mean_train_loss,
    read_rows,
    round_line,
    rounds_figure,
    rounds_picture,
    rounds_table,
)

KEYS = {
    "round", "loss", "accuracy", "evaluated", "head", "train_loss", "client_loss", "client_accuracy",
    "client_accuracy_min", "bytes_up", "bytes_down", "seconds", "server_seconds", "clients", "rejected", "reasons",
    "epsilon", "strategy", "kept", "effective_rank", "perplexity", "margin", "f1", "general_loss", "generation",
    "per_client",
}  # fmt: skip


def test_a_row_has_the_documented_keys_and_is_json(tmp_path):
    metrics = ClientMetrics.read({"partition": 1.0, "num-examples": 3.0, "train-loss": 0.25})
    report = RoundReport(4, 0.5, 0.75, "central", per_client={1: metrics}, epsilon=epsilon_of({}))
    row = report.row()
    assert set(row) == KEYS
    append_row(tmp_path / "metrics.jsonl", row)
    (found,) = read_rows(tmp_path / "metrics.jsonl")
    assert found == json.loads(json.dumps(row))
    assert found["per_client"] == {"1": {"partition": 1.0, "num-examples": 3.0, "train-loss": 0.25}}


def test_unknown_metrics_are_left_out_and_absent_ones_stay_absent():
    metrics = ClientMetrics.read({"rank": 4.0, "patient-name": 1.0})
    assert metrics.row() == {"rank": 4.0}


def test_joining_prefers_what_came_later():
    first, later = ClientMetrics(rank=4.0, eval_loss=1.0), ClientMetrics(eval_loss=2.0)
    assert first.joined(later) == ClientMetrics(rank=4.0, eval_loss=2.0)


def test_means_are_weighted_by_examples():
    metrics = [ClientMetrics(train_loss=1.0, num_examples=1.0), ClientMetrics(train_loss=4.0, num_examples=2.0)]
    assert mean_train_loss(metrics) == pytest.approx(3.0)
    assert mean_train_loss([*metrics, ClientMetrics(num_examples=1.0)]) is None
    assert mean_train_loss([]) is None
    found = Evaluation.of(
        [
            ClientMetrics(eval_loss=1.0, eval_accuracy=1.0, eval_examples=1.0),
            ClientMetrics(eval_loss=4.0, eval_accuracy=0.25, eval_examples=2.0),
            ClientMetrics(train_loss=9.0),
        ]
    )
    assert found == Evaluation(pytest.approx(3.0), pytest.approx(0.5), 0.25)
    assert Evaluation.of([ClientMetrics()]) is None


@pytest.mark.parametrize("unit", ["record", "client"])
def test_epsilon_is_the_largest_over_clients(unit):
    spent = {c: ClientMetrics(**{f"epsilon_per_{unit}": value}) for c, value in ((0, 1.0), (1, 5.0), (2, 3.0))}
    found = epsilon_of(spent | {3: ClientMetrics()})
    assert (found.unit, found.clients, found.largest, found.median, found.smallest) == (unit, 3, 5.0, 3.0, 1.0)


def test_rows_after_a_round_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for number in range(1, 6):
        append_row(path, RoundReport(number).row())
    drop_rows_after(path, 3)
    assert [row["round"] for row in read_rows(path)] == [1, 2, 3]


def test_line_table_and_picture_take_a_round_that_was_not_evaluated(tmp_path):
    rows = [RoundReport(1).row(), RoundReport(2, 0.5, 0.625, "central", train_loss=0.7, clients=3).row()]
    assert "not evaluated" in round_line(rows[0], 2)
    assert "accuracy 0.625 (central), 3 clients" in round_line(rows[1], 2)
    assert rounds_table(rows, "rounds").row_count == 2
    held_out = [RoundReport(n, 0.5, client_loss=0.9 / (n + 1), client_accuracy=0.5).row() for n in range(4)]
    losses, _ = rounds_figure(held_out).axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[row["client_loss"] for row in held_out]]
    assert all(float(tick).is_integer() for tick in losses.get_xticks())
    rounds_picture(rows, tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
