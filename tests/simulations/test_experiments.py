"""The long experiments, on the default model and data: `make test-slow`. What they show is also tested quickly, on a
tiny model, by the tests of each part.
"""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bora_fl.cli import DEMO, cli
from bora_fl.config import Settings
from bora_fl.report import read_rows
from bora_fl.simulations.engine import simulate
from bora_fl.simulations.faults.catalogue import FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(*arguments: str) -> int:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False).exit_code


def test_the_demo_learns(tmp_path: Path):
    """The README's figures are .680 before training and .717 after it."""
    rows = read_rows(simulate(DEMO | {"run.output-dir": str(tmp_path / "run")}, 4) / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(Settings().run.num_rounds + 1))
    assert rows[0]["accuracy"] > 0.67
    assert rows[-1]["evaluated"] == "central"
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.02


def test_refactoring_is_no_worse_than_averaging_in_any_seed_of_a_comparison(tmp_path: Path):
    options = ("--strategies", "fedavg,refactor", "--scenarios", "dirichlet-1", "--seeds", "2", "--workers", "2")
    assert run("compare", "--quick", *options, "--output", str(tmp_path)) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert {end["status"] for end in content["runs"]} == {"finished"}
    found = {summary["variant"]["strategy"]: summary for summary in content["summaries"]}
    assert found["refactor"]["merge_error"]["mean"] < found["fedavg"]["merge_error"]["mean"]
    assert found["refactor"]["difference"]["mean"] > -0.02


def test_every_fault_in_process_ends_in_the_right_adapter(tmp_path: Path):
    names = [name for name, fault in FAULTS.items() if fault.where == "in process"]
    assert run("faults", "--only", ",".join(names), "--output", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == set(names)
    assert all(row["correct"] for row in results.values())
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/finished.json")}
    assert run("faults", "--only", ",".join(names), "--output", str(tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in marks} == marks


def test_a_robust_rule_withstands_what_averaging_does_not(tmp_path: Path):
    options = ("--attacks", "none,scaling", "--defences", "none,multi-krum", "--workers", "2")
    assert run("attacks", *options, "--output", str(tmp_path)) == 0
    accuracy = {
        path.parent.name.rpartition("-0-")[0]: json.loads(path.read_text())["result"]["accuracy"]
        for path in tmp_path.glob("runs/*/finished.json")
    }
    assert len(accuracy) == 4
    assert accuracy["scaling-multi-krum"] > accuracy["scaling-none"] + 0.1
    assert accuracy["scaling-multi-krum"] > accuracy["none-none"] - 0.05
