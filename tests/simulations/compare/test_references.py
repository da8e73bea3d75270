import json

import pytest

from bora_fl.report import read_rows
from bora_fl.simulations import grid
from bora_fl.simulations.compare import report, results
from bora_fl.simulations.compare.plan import Variant
from bora_fl.simulations.compare.references import MOST_LOCAL, central, iid, local, reference_runs, share_of_central

from .made_up import finish, lay_out

FEDAVG = Variant("bora", "fedavg")


def changed(run, like) -> dict:
    return {k: v for k, v in run.settings.flat().items() if v != like.settings.flat()[k]}


def test_the_twin_differs_in_how_examples_are_dealt(tmp_path):
    run = lay_out(tmp_path).runs[0]
    assert changed(iid(run), run) == {"data.partition": "iid", "data.alpha": 0.5}
    assert iid(run).num_clients == run.num_clients


def test_central_training_takes_the_steps_of_all_clients_of_a_round(tmp_path):
    run = lay_out(tmp_path, {"strategy.fraction-train": 0.5}).runs[0]
    one = central(run)
    assert one.num_clients == 1
    assert one.settings.train.local_steps == 2 * 8
    assert one.cost == run.cost


def test_clients_alone_have_the_data_that_they_have_together(tmp_path):
    run = lay_out(tmp_path, clients=40).runs[0]
    alone = local(run)
    assert len(alone) == MOST_LOCAL
    assert [one.node_configs[0]["partition-id"] for one in alone] == list(range(0, 40, 5))
    assert {one.node_configs[0]["num-partitions"] for one in alone} == {40}
    assert len({one.folder for one in alone}) == MOST_LOCAL
    assert {one.settings.data.partition for one in alone} == {"dirichlet"}
    assert len(local(lay_out(tmp_path, clients=3).runs[0])) == 3


@pytest.mark.parametrize(
    ("clients", "alone"),
    [(8, [0, 1, 2, 3, 4, 5, 6, 7]), (12, [0, 1, 3, 4, 6, 7, 9, 10]), (20, [0, 2, 5, 7, 10, 12, 15, 17])],
)
def test_clients_alone_are_spread_over_all(clients, alone, tmp_path):
    found = local(lay_out(tmp_path, clients=clients).runs[0])
    assert [one.node_configs[0]["partition-id"] for one in found] == alone


def test_a_client_alone_has_its_rank(tmp_path):
    (run,) = lay_out(tmp_path, scenarios=["mixed-ranks"], strategies=["flora"], seeds=1).runs
    assert [one.node_configs[0]["rank"] for one in local(run)] == [2, 4, 8, 2]
    assert central(run).node_configs == {}


def test_what_asks_for_several_clients_is_not_asked_of_one(tmp_path):
    asked = {"strategy.min-nodes": 4, "strategy.min-replies": 2, "strategy.robust": "trimmed-mean"}
    run = lay_out(tmp_path, asked, strategies=["fedavg"], seeds=1).runs[0]
    for one in (central(run), *local(run)):
        strategy = one.settings.strategy
        assert (strategy.min_nodes <= 1, strategy.min_replies, strategy.robust) == (True, 1, "none")
    secure = lay_out(tmp_path, {"privacy.secure-aggregation": True}, strategies=["fedavg"], seeds=1).runs[0]
    assert not central(secure).settings.privacy.secure_aggregation


def test_every_reference_is_run_once(tmp_path):
    found = lay_out(tmp_path, scenarios=["dirichlet-1", "dirichlet-0.1", "iid"])
    runs = reference_runs(found, FEDAVG)
    assert len({run.folder for run in runs}) == len(runs)
    # By seed: an IID twin for each of two strategies and one central run serve all scenarios; four clients alone each.
    assert len(runs) == 2 * (2 + 1 + 3 * 4)


def test_a_report_says_what_accuracies_are_read_against(tmp_path):
    found = lay_out(tmp_path)
    for run in found.runs:
        finish(run, 0.6 if run.variant == FEDAVG else 0.72, floor=0.5 + run.seed / 10)
    for run in reference_runs(found, FEDAVG):
        if run.scenario == "iid":
            finish(run, 0.8)
        elif run.scenario == "central":
            finish(run, 0.9)
        else:
            finish(run, 0.1 * (1 + run.node_configs[0]["partition-id"]))
    collected = results.collect(found, [(run, grid.outcome(run)) for run in found.runs], FEDAVG)
    ours, other = collected.summaries
    assert ours.retention.mean == pytest.approx(0.75)
    assert other.retention.mean == pytest.approx(0.9)
    assert ours.gain.mean == pytest.approx(0.6 - 0.55)
    assert ours.learning_rate == found.runs[0].settings.train.learning_rate
    against = collected.references["dirichlet-1"]
    assert [against.floor.mean, against.local.mean, against.iid.mean, against.central.mean] == pytest.approx(
        [0.55, 0.25, 0.8, 0.9]
    )
    line = "read against (%): zero rounds 55.0 ± 63.5, local only 25.0, IID federated 80.0, central 90.0"
    assert line in report.markdown(collected)
    bare = results.collect(lay_out(tmp_path, seeds=1), [(found.runs[0], grid.outcome(found.runs[0]))], FEDAVG)
    assert bare.summaries[0].accuracy.mean == pytest.approx(0.6)


def test_references_that_were_not_run_are_left_open(tmp_path):
    found = lay_out(tmp_path)
    for run in found.runs:
        finish(run, 0.6)
    collected = results.collect(found, [(run, grid.outcome(run)) for run in found.runs], FEDAVG)
    assert collected.summaries[0].retention is None
    assert "read against (%): zero rounds 50.0\n" in report.markdown(collected)


def test_what_the_clients_measured_stands_in_no_column_of_the_central_test_set(tmp_path):
    found = lay_out(tmp_path, {"data.test-split": ""})
    beside = reference_runs(found, FEDAVG)
    for run in [*found.runs, *beside]:
        finish(run, 0.6, evaluated="clients")
    collected = results.collect(found, [(run, grid.outcome(run)) for run in found.runs], FEDAVG)
    for summary in collected.summaries:
        assert [summary.accuracy, summary.loss, summary.gain, summary.retention, summary.of_central] == [None] * 5
    assert {row.accuracy for row in collected.rows} == {None}
    assert "read against (%): nothing was measured on a central test set\n" in report.markdown(collected)


def test_references_run(tiny_config, tmp_path):
    config = {k: v for k, v in tiny_config.items() if k not in ("strategy.name", "run.output-dir")}
    found = lay_out(tmp_path, config | {"run.num-rounds": 1, "train.local-steps": 1}, clients=2, seeds=1)
    runs = [central(found.runs[0]), *local(found.runs[0])]
    for run in runs:
        grid.execute(run)
        assert grid.is_finished(run)
    trained = [read_rows(run.folder / "metrics.jsonl")[-1]["per_client"] for run in runs]
    assert [sorted(clients) for clients in trained] == [["0"], ["0"], ["1"]]
    examples = [sum(m["num-examples"] for m in clients.values()) for clients in trained]
    assert examples[1] + examples[2] == pytest.approx(examples[0], abs=2)  # what is held out is rounded


def test_the_fall_in_loss_is_a_share_of_the_central_run_s(tmp_path):
    runs = lay_out(tmp_path, strategies=["fedavg"], seeds=1).runs
    middle = central(runs[0])
    for run, last in ((runs[0], 2.5), (middle, 2.0)):
        finish(run, 0.6)
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        rows[0]["loss"], rows[1]["loss"] = 4.0, last
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {run.folder: run for run in (runs[0], middle)}
    found = share_of_central(runs, {0: runs[0]}, done)
    assert found is not None
    assert found.mean == pytest.approx(0.75)
    assert share_of_central(runs, {0: runs[0]}, {runs[0].folder: runs[0]}) is None


def test_the_twin_with_examples_dealt_at_random_is_the_scenario_s_own_run(tmp_path):
    runs = lay_out(tmp_path, strategies=["fedavg"], scenarios=["dirichlet-1", "iid"], seeds=1).runs
    assert iid(runs[0]).folder == runs[1].folder
