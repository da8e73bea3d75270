"""`bora-fl run` on a deployment, with a `flwr` that answers as Flower's does; test_loopback.py has the real one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bora_fl.config import ConfigError
from bora_fl.deployment import launch
from bora_fl.deployment.launch import LaunchError, attach, reason, run, stop

ROOT = Path(__file__).resolve().parents[2]
RUN_ID = "1234567890123456789"

# Writes what it was called with, and plays a run that ends when the file `end` holds its status.
FLWR = """#!{python}
import json, pathlib, sys, time
here = pathlib.Path({folder!r})
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
command = sys.argv[1]
if command == "run":
    if (here / "refuse").exists():
        sys.exit("Error: no SuperLink for " + sys.argv[2])
    print(json.dumps({{"success": True, "run-id": "{run_id}"}}, indent=2))
elif command == "log":
    print("INFO :      Starting\\nbora-fl | round 1/2: train loss 1.0", flush=True)
    while not (here / "end").exists():
        time.sleep(0.05)
    print(f"bora_fl.strategies.observer.RunFailedError: too few\\n")
elif command == "ls":
    print(json.dumps({{"success": True, "runs": [{{"status": (here / "end").read_text()}}]}}))
"""


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a `flwr` that plays a run, and its calls."""
    script = tmp_path / "bin" / "flwr"
    script.parent.mkdir()
    script.write_text(FLWR.format(python=sys.executable, folder=str(tmp_path), run_id=RUN_ID))
    script.chmod(0o755)
    monkeypatch.setenv("BORA_FL_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(launch, "tool", lambda name: str(script))
    return tmp_path


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def never(run_id: str) -> bool:
    raise AssertionError


def test_a_completed_run_leaves_its_log_with_its_submitter_and_no_server_s_folder(flower: Path):
    (flower / "end").write_text("finished:completed")
    lines: list[str] = []
    output = flower / "srv" / "run1"
    outcome = run(ROOT, {"run.output-dir": str(output)}, "hospitals", stops=never, show=lines.append)
    assert lines == [f"run {RUN_ID} has started on hospitals", "round 1/2: train loss 1.0"]
    assert outcome.log == flower / "state" / "runs" / "hospitals" / f"{RUN_ID}.log"
    assert "round 1/2" in outcome.log.read_text()
    assert outcome.folder is None
    assert not output.exists()
    submitted = calls(flower)[0]
    assert submitted[2:] == ["hospitals", "--format", "json", "--run-config", f'run.output-dir="{output}"']


def test_a_run_that_does_not_complete_says_why(flower: Path):
    (flower / "end").write_text("finished:failed")
    with pytest.raises(LaunchError, match=r"finished:failed: .*RunFailedError: too few"):
        attach(RUN_ID, "hospitals", stops=never, show=lambda line: None)


@pytest.mark.parametrize(
    ("name", "words"),
    [("fedavgg", "did you mean fedavg"), ("tests.strategies.test_trial:raising", r"in _helper: IndexError")],
)
def test_a_strategy_that_cannot_merge_is_refused_before_anything_is_sent(name: str, words: str, flower: Path):
    with pytest.raises(ConfigError, match=words):
        run(ROOT, {"strategy.name": name}, "hospitals", stops=never, show=lambda line: None)
    assert not (flower / "calls").exists()


def test_a_run_that_does_not_start_says_so(flower: Path):
    (flower / "refuse").touch()
    with pytest.raises(LaunchError, match=r"no SuperLink for the app$") as error:
        run(ROOT, {}, "hospitals", stops=never)
    assert calls(flower)[0][1] not in str(error.value)


def test_a_wrong_setting_stops_before_anything_starts(flower: Path):
    with pytest.raises(ConfigError, match="did you mean"):
        run(ROOT, {"run.num-round": 2}, "hospitals", stops=never)
    assert not (flower / "calls").exists()


def test_a_run_is_stopped_by_its_id(flower: Path):
    stop(RUN_ID, "hospitals")
    assert calls(flower) == [["stop", RUN_ID, "hospitals"]]


MAIN = """
import sys
from bora_fl import cli
from bora_fl.deployment import launch
flwr = sys.argv.pop(1)
launch.tool = lambda name: flwr
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "choice"), [(signal.SIGTERM, "ask"), (signal.SIGINT, "leave"), (signal.SIGINT, "stop")]
)
def test_an_interrupted_follower_leaves_or_stops_the_run_and_no_process(number: int, choice: str, flower: Path):
    command = [sys.executable, "-c", MAIN, str(flower / "bin" / "flwr"), "run", "hospitals", "--attach", RUN_ID]
    command += ["--on-interrupt", choice]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("round 1/2")
        below = psutil.Process(process.pid).children(recursive=True)
        assert below
        process.send_signal(number)
        said = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number
    assert RUN_ID in said
    stopped = ["stop", RUN_ID, "hospitals"] in calls(flower)
    assert stopped == (choice == "stop")
    if not stopped:  # nobody to ask: it is left
        assert f"--attach {RUN_ID} hospitals" in said
        assert f"bora-fl stop {RUN_ID} hospitals" in said
    _, left = psutil.wait_procs(below, timeout=5)
    assert not left


LOG = """INFO :      Starting
bora-fl | round 1/3: train loss 1.0
ERROR :     ServerApp raised an exception
Traceback (most recent call last):
  File "run.py", line 1, in run
bora_fl.strategies.observer.RunFailedError: 1 of 3 nodes are connected after 600 s; start more SuperNodes
or lower strategy.min-nodes
INFO :      Finished
"""


def test_the_reason_of_a_failure_is_what_the_log_names():
    first, second = reason(LOG).splitlines()
    assert first.startswith("bora_fl.strategies.observer.RunFailedError: 1 of 3 nodes")
    assert second == "or lower strategy.min-nodes"


def test_a_run_that_was_killed_is_said_to_be_resumable():
    assert "run.resume=true" in reason("\n".join(LOG.splitlines()[:2]))


@pytest.mark.parametrize(("length", "moved"), [(20, False), (90, True)])
def test_ray_gets_another_temporary_folder_where_a_socket_s_path_would_be_too_long(
    length: int, moved: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * length)
    assert launch.flower_environment().get("RAY_TMPDIR") == ("/tmp" if moved else None)
    monkeypatch.setenv("RAY_TMPDIR", "/short")
    assert launch.flower_environment()["RAY_TMPDIR"] == "/short"


def test_flower_s_output_is_not_colored_in_jupyter(monkeypatch: pytest.MonkeyPatch):
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.setenv(name, "1")
    assert not {"FORCE_COLOR", "CLICOLOR_FORCE"} & launch.flower_environment().keys()
    assert {"FORCE_COLOR", "CLICOLOR_FORCE"} <= os.environ.keys()
