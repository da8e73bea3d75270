"""A whole comparison on the tiny model, one of its workers killed on the way."""

import csv
import io
import json
import math
import multiprocessing
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import bora_fl.client.site
from bora_fl.client import training
from bora_fl.report import training_rows
from bora_fl.simulations import grid
from bora_fl.simulations.compare import report, results
from bora_fl.simulations.compare.plan import CompareRun, Plan, Variant, plan
from bora_fl.simulations.engine import simulate

STRATEGIES = ["fedavg", "refactor"]
TIMES = {"seconds", "server_seconds", "per_client", "strategy"}  # clocks, and dictionaries that hold some


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, tiny_data: Path) -> dict[str, bool | int | float | str]:
    return {
        "model.name": str(tiny_model),
        "model.max-length": 16,
        "adapter.rank": 2,
        "adapter.num-blocks": 4,
        "data.name": str(tiny_data),
        "train.local-steps": 2,
        "train.batch-size": 8,
        "train.learning-rate": 0.02,
        "train.precision": "fp32",
        "strategy.fraction-evaluate": 1.0,
        "strategy.sweeps": 2,
        "run.num-rounds": 2,
    }


def lay_out(tiny, root: Path, strategies: list[str] = STRATEGIES, seeds: int = 2, **changes) -> Plan:
    return plan(
        tiny | changes,
        strategies=strategies,
        scenarios=["dirichlet-1"],
        methods=["bora"],
        seeds=range(seeds),
        clients=3,
        root=root,
        threads=1,
    )


def go(found: Plan, root: Path) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    grid.run_grid(found.runs, root, workers=1, threads=1, console=console, title="comparing")
    return console.export_text()


def kill_in(run: CompareRun, over: threading.Event) -> None:
    """Kill the worker once the run has a round behind it."""
    while not training_rows(run.folder / "metrics.jsonl"):
        if over.wait(0.005):
            return
    for child in multiprocessing.active_children():
        child.kill()


def outcomes(found: Plan) -> list[tuple[CompareRun, grid.Outcome]]:
    return [(run, grid.outcome(run)) for run in found.runs]


def measured(run: CompareRun) -> list[dict]:
    rows = training_rows(run.folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, str]:
    """A comparison of four runs whose last was killed."""
    root = tmp_path_factory.mktemp("compare") / "out"
    found = lay_out(tiny, root)
    over = threading.Event()
    killer = threading.Thread(target=kill_in, args=(found.runs[3], over))
    killer.start()
    said = go(found, root)
    over.set()
    killer.join()
    return found, root, said


def test_a_killed_worker_loses_one_run_and_the_next_command_makes_up_for_it(interrupted):
    found, root, said = interrupted
    ends = [grid.outcome(run) for run in found.runs]
    assert [end.status for end in ends] == ["finished"] * 3 + ["failed"]
    assert "SIGKILL" in ends[3].reason
    assert f"failed {found.runs[3]}" in said
    before = [(run.folder / grid.FINISHED).stat().st_mtime_ns for run in found.runs if grid.is_finished(run)]
    lost = results.collect(found, outcomes(found), Variant("bora", "fedavg"))
    assert [str(run) for run, _ in lost.failures] == ["dirichlet-1 bora/refactor seed 1"]
    assert "SIGKILL" in report.markdown(lost)

    said = go(found, root)
    assert "3 of 4 runs are finished already" in said
    assert all(grid.is_finished(run) for run in found.runs)
    after = [(run.folder / grid.FINISHED).stat().st_mtime_ns for run in found.runs]
    assert after[:3] == before
    for run in found.runs:
        assert [row["round"] for row in training_rows(run.folder / "metrics.jsonl")] == [1, 2]
        assert not (run.folder / "checkpoints").exists()
    _check_results(found, root)


def _check_results(found: Plan, root: Path) -> None:
    collected = results.collect(found, outcomes(found), Variant("bora", "fedavg"))
    csv_path, json_path = results.write(collected, root)
    html_path, table_path = report.write(collected, root)

    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3
    last = {(r["strategy"], int(r["seed"])): float(r["accuracy"]) for r in rows if r["round"] == "2"}
    content = json.loads(json_path.read_text())
    by_name = {s["variant"]["strategy"]: s for s in content["summaries"]}
    gaps = [last["refactor", seed] - last["fedavg", seed] for seed in (0, 1)]
    assert by_name["refactor"]["difference"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert by_name["refactor"]["difference"]["half_width"] == pytest.approx(
        12.706204736432095 * np.std(gaps, ddof=1) / math.sqrt(2), rel=1e-9
    )
    assert by_name["fedavg"]["difference"] is None
    assert by_name["fedavg"]["accuracy"]["mean"] == pytest.approx((last["fedavg", 0] + last["fedavg", 1]) / 2)
    assert by_name["refactor"]["merge_error"]["mean"] <= by_name["fedavg"]["merge_error"]["mean"]
    assert 0 < by_name["fedavg"]["reached"] <= 2  # the better seed reaches the mean of both
    assert {run["status"] for run in content["runs"]} == {"finished"}

    page = html_path.read_text()
    assert len(page) < 1_000_000
    assert not re.search(r"(src|href)=.?https?:", page)
    for strategy in STRATEGIES:
        assert f">{strategy}<" in page
        assert f"| {strategy} |" in table_path.read_text()
    assert page.count("data:image/svg+xml") == len(list(root.glob("*.png"))) >= 2


def test_a_worker_that_did_other_runs_computes_what_a_fresh_process_does(interrupted, tiny, tmp_path: Path):
    found, _, _ = interrupted
    alone = lay_out(tiny, tmp_path).runs[2]
    bora_fl.client.site._current = None
    grid.execute(alone)
    assert measured(alone) == measured(found.runs[2])


def test_folds_of_one_run_do_not_leak_into_the_next(tiny, tmp_path: Path):
    bora_fl.client.site._current = None
    flora, after = lay_out(tiny, tmp_path / "a", ["flora", "fedavg"], seeds=1).runs
    grid.execute(flora)
    grid.execute(after)
    bora_fl.client.site._current = None
    alone = lay_out(tiny, tmp_path / "b", ["fedavg"], seeds=1).runs[0]
    grid.execute(alone)
    assert measured(after) == measured(alone)


def test_common_random_numbers(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[bytes] = []
    draw = training.draw_batches

    def record(*arguments):
        for batch in draw(*arguments):
            drawn.append(batch.tobytes())
            yield batch

    monkeypatch.setattr(training, "draw_batches", record)

    def stream(strategy: str, seed: int) -> tuple[list[list[str]], list[bytes], dict[str, float]]:
        """The clients of each round, every batch they drew, and the losses of round 1."""
        drawn.clear()
        config = tiny | {"strategy.name": strategy, "run.seed": seed, "strategy.fraction-train": 0.6}
        config |= {"run.output-dir": str(tmp_path / f"{strategy}-{seed}"), "strategy.fraction-evaluate": 0.0}
        config |= {"data.partition": "dirichlet", "data.alpha": 1.0}
        rows = training_rows(simulate(config, 4) / "metrics.jsonl")
        losses = {client: metrics["train-loss"] for client, metrics in rows[0]["per_client"].items()}
        return [sorted(row["per_client"]) for row in rows], list(drawn), losses

    first = stream("fedavg", 0)
    assert [len(clients) for clients in first[0]] == [2, 2]
    assert len(first[1]) == 2 * 2 * 2
    assert stream("flora", 0) == first
    assert stream("ffa", 0)[:2] == first[:2]  # it trains fewer parts, on the same batches
    assert stream("fedavg", 1)[1] != first[1]


def test_private_runs_spend_their_own_budget_and_report_it(tiny, tmp_path: Path):
    config = tiny | {"privacy.delta": 1e-2, "privacy.accountant": "rdp", "run.num-rounds": 1}
    found = plan(
        config, strategies=STRATEGIES, scenarios=["natural"], methods=["bora"], seeds=[0], clients=3, root=tmp_path,
        threads=1, privacy=["8"],
    )  # fmt: skip
    assert found.runs[0].num_clients == 4
    runs = [replace(run, num_clients=3) for run in found.runs]
    found = replace(found, runs=runs)
    for run in [*runs, runs[0]]:  # one that is run again starts with an empty ledger
        grid.execute(run)
    collected = results.collect(found, outcomes(found), Variant("bora", "fedavg"))
    for summary in collected.summaries:
        assert 7.0 < summary.epsilon <= 8.0
        assert summary.epsilon_unit == "record"
    assert "per record" in report.markdown(collected)
    for run in runs:
        assert len(list((run.folder / "ledger").glob("*.json"))) == 3
