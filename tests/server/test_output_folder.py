"""An output folder belongs to one run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bora_fl.config import ConfigError
from bora_fl.report import training_rows
from bora_fl.server.output_folder import held, refuse_another_run
from bora_fl.simulations import grid, launch
from bora_fl.simulations.engine import simulate

HOLD = """
import pathlib, sys, time
from bora_fl.server.output_folder import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_told_who_holds_the_folder_until_that_one_is_killed(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ConfigError) as error, held(tmp_path):
                raise AssertionError("two runs hold the folder")
            for part in (f"run.output-dir = '{tmp_path}'", f"process {process.pid} on ", "another run.output-dir"):
                assert part in str(error.value)
        finally:
            process.kill()
    with held(tmp_path):
        pass


@pytest.mark.parametrize("below", ["", "below"])
def test_a_folder_that_cannot_be_is_said(below: str, tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"run.output-dir = '.*file.*': nothing can be written there \(\w"),
        held(tmp_path / "file" / below),
    ):
        pass
    with pytest.raises(ConfigError, match=r"run\.output-dir ="):
        launch.run(Path(), {"run.output-dir": str(tmp_path / "file" / below)}, launch.Simulation(2))
    with pytest.raises(ConfigError, match="--output '"):
        grid.run_grid([], tmp_path / "file" / below, workers=1, threads=1, console=Console(), title="")


def test_a_read_only_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="it is read-only"), held(tmp_path):
        pass


def test_two_runs_do_not_write_to_one_folder(tiny_config: dict[str, Any]):
    refused = []

    def start_another(message: Any, partition: int) -> Any:
        if not refused:
            with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* writes to it") as error:
                simulate(tiny_config | {"run.resume": True}, 3)
            refused.append(error)
        return message

    folder = simulate(tiny_config, 3, tamper=start_another)
    assert refused
    assert [row["round"] for row in training_rows(folder / "metrics.jsonl")] == [1, 2, 3]
    simulate(tiny_config | {"run.resume": True}, 3)  # the folder is free again


@pytest.mark.parametrize("content", [b"{", b"\xff\n", b'{"round": 1}\n'])
def test_metrics_that_cannot_be_read_are_no_empty_folder(content: bytes, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"holds a run already; set run\.resume=true"):
        refuse_another_run(tmp_path)


def test_a_folder_with_checkpoints_alone_is_not_empty(tiny_config: dict[str, Any]):
    folder = simulate(tiny_config, 3)
    kept = sorted((folder / "checkpoints").rglob("*"))
    (folder / "metrics.jsonl").write_bytes(b"\xff" + (folder / "metrics.jsonl").read_bytes()[1:])
    for spoil in (lambda: None, (folder / "metrics.jsonl").unlink):
        spoil()
        with pytest.raises(ConfigError, match="holds a run already"):
            simulate(tiny_config, 3)
        assert sorted((folder / "checkpoints").rglob("*")) == kept


def test_an_empty_folder_is_free(tmp_path: Path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    refuse_another_run(tmp_path)


def test_a_run_that_cannot_go_on_says_what_lacks(tiny_config: dict[str, Any], caplog: pytest.LogCaptureFixture):
    given = tiny_config | {"run.num-rounds": 1, "train.local-steps": 1, "run.resume": True}
    with caplog.at_level("INFO", logger="bora_fl"):
        folder = simulate(given, 2)
    assert "no checkpoint" in caplog.text
    assert "the run begins" in caplog.text
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match="it has no checkpoint to go on from: restore its folder checkpoints, or"):
        simulate(given, 2)
