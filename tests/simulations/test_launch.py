"""Simulations as `bora-fl run --simulate` starts them: a process with its workers, and no port."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from bora_fl.config import ConfigError
from bora_fl.report import read_rows
from bora_fl.simulations.engine import simulate
from bora_fl.simulations.launch import LaunchError, Simulation, run
from bora_fl.tracking.activity import Activity

ROOT = Path(__file__).resolve().parents[2]

RAISING = {"strategy.name": "tests.strategies.test_trial:raising"}

# Tries to connect to Unix sockets.
STRANGER = """
import json, socket, sys
reached = []
for path in json.loads(sys.argv[1]):
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(2)
            s.connect(path)
            reached.append(path)
    except OSError:
        pass
print(json.dumps(reached))
"""


class Watched:
    """Keeps all that it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seen: list[Activity] = []

    def __call__(self, text: str) -> None:
        self.lines.append(text)

    def activity(self, now: Activity) -> None:
        self.seen.append(now)


def command(config: dict, clients: int) -> list[str]:
    options = [word for key, value in config.items() for word in ("-c", f"{key}={value}")]
    return [sys.executable, "-m", "bora_fl.cli", "run", "--simulate", str(clients), "--app", str(ROOT), *options]


def marked(folder: Path) -> list[psutil.Process]:
    """The processes of the simulation whose results go to a folder, and what they have started."""
    found = {}
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()):
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
        except psutil.Error:
            continue
    return list(found.values())


def reached(paths: list[str], *as_user: str) -> list[str]:
    """The sockets that a program of some user can connect to."""
    program = [*as_user, sys.executable, "-c", STRANGER, json.dumps(paths)]
    return json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


def rounds(folder: Path) -> int:
    return len(read_rows(folder / "metrics.jsonl"))


def until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_simulation_gives_the_adapter_of_one_process_and_leaves_nothing_behind(tiny_config, tmp_path: Path):
    config = tiny_config | {"run.num-rounds": 2}
    watch = Watched()
    outcome, lines = run(ROOT, config, Simulation(3), show=watch), watch.lines
    assert {(now.what, now.round) for now in watch.seen} >= {("train", 1), ("merge", 1), ("train", 2), ("merge", 2)}
    answered = [(now.done, now.total) for now in watch.seen if (now.what, now.round) == ("train", 2)]
    assert answered == sorted(answered)
    assert {total for _, total in answered} == {3}
    assert {client for now in watch.seen for client in now.clients} == {0, 1, 2}
    assert [(row["round"], row["clients"]) for row in outcome.rows] == [(0, 0), (1, 3), (2, 3)]
    assert [line.split(":")[0] for line in lines if "/2: train loss" in line] == ["round 0/2", "round 1/2", "round 2/2"]
    assert not marked(outcome.folder)
    single = simulate(config | {"run.output-dir": str(tmp_path / "one")}, 3)
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (single, outcome.folder)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_a_run_whose_patience_ends_has_a_result(tiny_config):
    given = {"run.num-rounds": 9, "run.keep-best": True, "run.patience": 1, "train.learning-rate": 1e-9}
    outcome = run(ROOT, tiny_config | given, Simulation(2), show=lambda line: None)
    assert 1 < outcome.rows[-1]["round"] < 9
    assert (outcome.folder / "adapter").is_dir()


def test_data_and_model_are_checked_before_the_federation_starts(tiny_config):
    lines: list[str] = []
    wrong = {"adapter.target-modules": "nowhere", "train.batch-size": 1000}
    with pytest.raises(ConfigError, match=r"model .*: .*adapter\.target-modules"):
        run(ROOT, tiny_config | wrong, Simulation(2), show=lines.append)
    assert [line.split(" /")[0] for line in lines[1:]] == ["warning: data"]


def test_a_run_that_fails_says_so(tiny_config):
    folder = Path(tiny_config["run.output-dir"])
    folder.mkdir()
    (folder / "partition.png").mkdir()  # which no check looks at
    with pytest.raises(LaunchError, match=r"IsADirectoryError"):
        run(ROOT, tiny_config, Simulation(2), show=lambda line: None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda config: run(ROOT, config | {"run.num-round": 2}, Simulation(2)), "did you mean"),
        (lambda config: run(ROOT / "docs", config, Simulation(2)), "--app"),
        (
            lambda config: run(ROOT, config | RAISING, Simulation(2)),
            "in _helper: IndexError",
        ),
        (lambda config: Simulation(0), "--simulate 0"),
        (lambda config: Simulation(2, 0), "--cpus 0"),
        (lambda config: Simulation(2, backend="dask"), "--backend dask"),
    ],
)
def test_a_wrong_setting_stops_before_anything_starts(make, message: str, tiny_config):
    with pytest.raises(ConfigError, match=message):
        make(tiny_config)
    assert not Path(tiny_config["run.output-dir"]).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's tables of sockets are Linux's")
def test_no_other_user_can_talk_to_a_simulation_and_killing_its_launcher_ends_it(tiny_config, tmp_path: Path):
    folder = tmp_path / "run"
    config = tiny_config | {"run.num-rounds": 500, "run.output-dir": str(folder)}
    with subprocess.Popen(command(config, 3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        try:
            until(lambda: rounds(folder) >= 2, 120)
            processes = marked(folder)
            assert len(processes) >= 3  # launcher, server, at least a worker
            listening = [c for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            assert not listening
            inodes = {
                os.readlink(fd)[8:-1]
                for p in processes
                for fd in Path(f"/proc/{p.pid}/fd").iterdir()
                if fd.is_symlink() and os.readlink(fd).startswith("socket:")
            }
            table = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
            accepting = 1 << 16  # __SO_ACCEPTCON
            paths = [r[7].replace("@", "\0") for r in table if r[6] in inodes and int(r[3], 16) & accepting]
            if os.geteuid() == 0 and paths:
                assert reached(paths, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") == []
                assert reached(paths) == paths  # the same program sees them if it may
        finally:
            launcher.kill()
    until(lambda: not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 10)


def test_an_interrupted_simulation_ends_whole_and_goes_on_later(tiny_config, tmp_path: Path):
    folder = tmp_path / "run"
    config = tiny_config | {"run.num-rounds": 500, "run.output-dir": str(folder)}
    with subprocess.Popen(command(config, 2), stdout=subprocess.PIPE, text=True) as launcher:
        until(lambda: rounds(folder) >= 2, 120)
        processes = marked(folder)
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate(timeout=30)[0]
    assert launcher.returncode == 130
    assert "run.resume=true" in said
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    done = rounds(folder)
    more = config | {"run.num-rounds": done, "run.resume": True}
    outcome = run(ROOT, more, Simulation(2), show=lambda line: None)
    assert [row["round"] for row in outcome.rows] == list(range(done + 1))
