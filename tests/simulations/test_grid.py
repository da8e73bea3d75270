"""The grid on runs of one line; workers find them in a module that the test writes."""

import importlib
import io
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock
from rich.console import Console

from bora_fl.config import ConfigError
from bora_fl.simulations import grid

TOY = """
import os
from dataclasses import dataclass
from pathlib import Path
from bora_fl.simulations import grid

@dataclass(frozen=True)
class Toy(grid.Run):
    label: str
    code: str
    root: Path
    name = property(lambda self: self.label)
    identity = property(lambda self: {"label": self.label, "numbers": (1, 2)})

    def work(self):
        with (self.root / "log").open("a") as file:
            file.write(self.label + " ")
        print("said", flush=True)
        (self.folder / "left").write_text("")
        (self.folder / "made").mkdir()
        return {"value": eval(self.code)}

    def stands(self, result):
        return result["value"] != "poor"

    def line(self, result):
        return f"value {result['value']}" if self.label == "talks" else ""
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "bora_fl_toy_runs.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("bora_fl_toy_runs")


def go(runs: list, root: Path) -> tuple[list[grid.Outcome], str]:
    console = Console(width=300, record=True, file=io.StringIO())
    ended = grid.run_grid(runs, root, workers=1, threads=1, console=console, title="trying")
    assert [run for run, _ in ended] == runs
    return [end for _, end in ended], console.export_text()


def test_what_is_finished_is_skipped_and_what_failed_is_run_again(toy: ModuleType, tmp_path: Path):
    good, raises = toy.Toy("good", "3", tmp_path), toy.Toy("raises", "1 / 0", tmp_path)
    dies, talks = toy.Toy("dies", "os._exit(3)", tmp_path), toy.Toy("talks", "os.environ['OMP_NUM_THREADS']", tmp_path)
    ends, said = go([good, raises, dies, talks], tmp_path)
    assert [end.status for end in ends] == ["finished", "failed", "failed", "finished"]
    assert ends[0].result == {"value": 3}
    assert ends[0].seconds is not None
    assert ends[0].versions.keys() == {"bora_fl", "torch"}
    assert "ZeroDivisionError: division by zero" in ends[1].reason
    assert str(raises.folder / grid.LOG) in ends[1].reason
    assert "ZeroDivisionError" in (raises.folder / grid.LOG).read_text()
    assert "exit code 3" in ends[2].reason
    assert "said" in (good.folder / grid.LOG).read_text()
    assert "4/4 talks: value 1" in said
    assert "1/4 good\n" in said

    ends, said = go([good, toy.Toy("raises", "7", tmp_path), talks], tmp_path)
    assert "2 of 3 runs are finished already" in said
    assert [end.status for end in ends] == ["finished"] * 3
    assert ends[1].result == {"value": 7}
    assert not (raises.folder / grid.FAILED).exists()
    assert (tmp_path / "log").read_text() == "good raises dies talks raises "
    assert go([good], tmp_path)[0][0].status == "finished"


def test_a_reason_with_brackets_is_said_as_it_is(toy: ModuleType, tmp_path: Path):
    odd = toy.Toy("odd", "{}['[/tmp] [red]']", tmp_path)
    (end,), said = go([odd], tmp_path)
    assert end.status == "failed"
    assert "failed odd: KeyError: '[/tmp] [red]'" in said


@pytest.mark.parametrize("damage", ["{", '{"identity": {}, "seconds": 1, "versions": {}, "result": {}}', "[]"])
def test_a_run_without_its_own_whole_mark_is_run_again(toy: ModuleType, tmp_path: Path, damage: str):
    run = toy.Toy("good", "3", tmp_path)
    grid.execute(run)
    assert grid.is_finished(run)
    (run.folder / grid.FINISHED).write_text(damage)
    assert grid.outcome(run).status == "missing"
    (run.folder / "stale").write_text("")
    grid.execute(run)
    assert grid.is_finished(run)
    assert not (run.folder / "stale").exists()


def test_a_poor_result_is_kept_and_run_again(toy: ModuleType, tmp_path: Path):
    run = toy.Toy("good", "'poor'", tmp_path)
    grid.execute(run)
    assert grid.outcome(run).result == {"value": "poor"}
    assert not grid.is_finished(run)


def test_two_commands_do_not_write_in_one_folder(toy: ModuleType, tmp_path: Path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another command is at work"):
        go([toy.Toy("good", "3", tmp_path)], tmp_path)
    assert not (tmp_path / "log").exists()
