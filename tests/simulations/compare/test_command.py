"""What the command hands to the plan."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.config import Federation, federation_text
from bora_fl.simulations import grid
from bora_fl.simulations.compare import command, plan, results

from .made_up import finish, lay_out

SETTINGS = {
    "adapter.method": "ravan",
    "adapter.rank": 12,
    "data.num-partitions": 20,
    "model.name": "somewhere",
    "data.name": "reviews.csv",
    "train.local-steps": 7,
    "strategy.name": "mine:rule",
    "run.num-rounds": 5,
    "run.output-dir": "runs/reviews",
}


class PlannedError(Exception):
    pass


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The arguments of the plan, in a folder with a federation.toml."""
    found: dict[str, Any] = {}

    def planning(base: dict[str, Any], **more: Any) -> None:
        found.update(more, base=base)
        raise PlannedError

    monkeypatch.setattr(plan, "plan", planning)
    monkeypatch.chdir(tmp_path)
    Path("federation.toml").write_text(federation_text(Federation(3, "", SETTINGS)))
    return found


def test_a_comparison_is_of_what_the_folder_s_file_says(planned: dict[str, Any]):
    done = CliRunner().invoke(cli, ["compare", "--strategies", "fedavg", "-c", "train.local-steps=9"])
    assert isinstance(done.exception, PlannedError)
    assert "federation.toml" in done.output
    taken = {key: planned["base"].get(key) for key in SETTINGS}
    left = ("strategy.name", "run.output-dir", "adapter.method", "data.num-partitions")
    assert taken == SETTINGS | dict.fromkeys(left)
    assert planned["methods"] == ["ravan"]
    assert planned["by_method"]["ravan"]["adapter.rank"] == 12  # and not what RAVAN needs from the defaults
    assert planned["chosen"] == {"train.local-steps": 9}
    assert planned["clients"] == 3
    assert planned["base"]["data.max-test-examples"] == 2000


@pytest.mark.parametrize("option", [["--quick"], ["--suite", "standard"], ["--privacy", "none"]])
def test_a_comparison_by_name_is_its_own(planned: dict[str, Any], option: list[str]):
    done = CliRunner().invoke(cli, ["compare", *option])
    assert isinstance(done.exception, PlannedError)
    assert planned["base"].get("model.name") != "somewhere"
    assert planned["methods"] == ["bora"]
    assert planned["clients"] != 3 or option == ["--quick"]


def test_what_is_given_is_judged_together_with_the_suite(planned: dict[str, Any]):
    given = ["-c", "data.packing=true", "-c", "run.generate-every=2"]
    done = CliRunner().invoke(cli, ["compare", "--suite", "language", *given])
    assert isinstance(done.exception, PlannedError)
    assert planned["chosen"] == {"data.packing": True, "run.generate-every": 2}
    done = CliRunner().invoke(cli, ["compare", "--suite", "standard", *given])
    assert "model.task" in str(done.exception)


@pytest.mark.parametrize("option", [["--rates", "0.5,1"], ["--tune-seeds", "1"]])
def test_options_of_a_search_need_one(planned: dict[str, Any], option: list[str]):
    done = CliRunner().invoke(cli, ["compare", *option])
    assert f"{' '.join(option)}: it says how --tune searches" in str(done.exception)
    done = CliRunner().invoke(cli, ["compare", "--tune", *option])
    assert isinstance(done.exception, PlannedError)
    done = CliRunner().invoke(cli, ["compare", "--rates", "1"])
    assert isinstance(done.exception, PlannedError)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_in_the_terminal_leaves_nothing_out(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    console = Console(width=80, file=io.StringIO(), force_terminal=terminal, no_color=True, record=True)
    monkeypatch.setattr(command, "console", console)
    found = lay_out(tmp_path)
    for run in found.runs:
        finish(run, 0.6 + run.seed / 100)
    baseline = found.variants[0]
    command._show(results.collect(found, [(run, grid.outcome(run)) for run in found.runs], baseline))
    said = console.export_text()
    words = "".join(said.split())
    assert "\N{HORIZONTAL ELLIPSIS}" not in said
    assert "retention" not in said  # which nothing was measured of
    for word in ("60.5±6.4", "refactor", "1.000", "overround0"):
        assert word in words
    assert terminal or "60.5 ± 6.4" in said  # on one line
