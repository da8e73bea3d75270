"""`flwr run` with what it needs set, followed to its end, and a true exit code.

Flower's command exits 0 even when the ServerApp crashed. Here a run counts as done only if Flower says that it
completed. The run belongs to its SuperLink: whoever submits it may leave it, come back to it, or stop it.
"""

import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bora_fl.config import Scalar, extensions, parse
from bora_fl.deployment.flower_app import stage
from bora_fl.deployment.processes import Service, exit_on_sigterm, tool
from bora_fl.deployment.progress import pass_on
from bora_fl.paths import state_folder

# What Flower, Ray and OpenMP must be told; the README says why.
ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
LOST_SECONDS = 180.0
# They color what is no terminal's, and JSON with it; Jupyter's kernel sets two of them.
_COLORS = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")
# Of a temporary folder's path, in bytes: Ray puts Unix sockets deep below it, and their paths have at most 107.
_LONGEST_FOR_RAY = 107 - len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.12")
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception): ")
_STAMP = re.compile(r"INFO|WARN|ERROR|bora-fl \|")

Show = Callable[[str], None]
"""Is given each line of a run's log that a person wants to read; see `progress.Watcher`."""


class LaunchError(RuntimeError):
    """A run that did not succeed, with the reason and the place of the log."""


@dataclass
class Outcome:
    """Where a finished run left its results: its folder on this machine, if it is here, and its log."""

    log: Path
    folder: Path | None = None
    rows: list[dict[str, object]] = field(default_factory=list)


def run(
    app: Path, run_config: Mapping[str, Scalar], connection: str, *, stops: Callable[[str], bool], show: Show = print
) -> Outcome:
    """Run a federation on a deployment, to its end.

    Args:
        app: See `flower_app.stage`.
        run_config: Overrides of the run config; checked before anything starts.
        connection: Name of a SuperLink connection in Flower's config.toml.
        stops: See `attach`.
        show: See `Show`.

    Returns:
        Where the log is. The results are on the machine of the ServerApp.

    Raises:
        ConfigError: For a setting that cannot be used.
        LaunchError: If the run failed in any way.
    """
    _refuse(run_config)
    with exit_on_sigterm():
        run_id = submit(app, run_config, connection, show=show)
        show(f"run {run_id} has started on {connection}")
        return attach(run_id, connection, stops=stops, show=show)


def _refuse(run_config: Mapping[str, Scalar]) -> None:
    """Refuse what can be known to fail before anything is sent; packages, data and model are at the server and sites.

    Raises:
        ConfigError: For a setting that cannot be used, or a strategy that cannot merge.
    """
    from bora_fl.strategies.trial import tried  # with torch, which a command that follows a run starts without

    tried(parse(run_config))


def submit(app: Path, run_config: Mapping[str, Scalar], connection: str, *, show: Show = print) -> str:
    """Start a run on a deployment and return its id.

    Raises:
        LaunchError: If it does not start.
    """
    overrides = " ".join(f"{key}={_toml(value)}" for key, value in extensions.portable(run_config).items())
    with tempfile.TemporaryDirectory() as copy:
        options = ["--format", "json", *(["--run-config", overrides] if overrides else [])]
        staged = str(stage(app, Path(copy), extensions.sources(run_config)))
        command = [tool("flwr"), "run", staged, connection, *options]
        submission = Service("submit", command, Path(copy), flower_environment())
        try:
            submission.start()
            submission.wait(math.inf)
        except (KeyboardInterrupt, SystemExit):
            show(f"interrupted; `flwr ls {connection}` says whether the run has started")
            raise
        finally:
            submission.stop()
        text = submission.text().replace(staged, "the app").replace(copy, "")  # that folder means nothing to a user
    with contextlib.suppress(ValueError, KeyError):
        return str(int(json.loads(text[text.index("{") : text.rindex("}") + 1])["run-id"]))
    raise LaunchError(f"`flwr run` did not start the run:\n{text.strip()}")


def attach(run_id: str, connection: str = "", *, stops: Callable[[str], bool], show: Show = print) -> Outcome:
    """Follow a run to its end, and judge it.

    Args:
        run_id: The run's id.
        connection: Name of a SuperLink connection; empty for the default of Flower's config.toml.
        stops: Asked, with the run's id, on Ctrl-C or SIGTERM, whether the run is to be stopped; it goes on otherwise.
        show: See `Show`.

    Raises:
        LaunchError: If the run failed, or the SuperLink does not answer any more.
    """
    target = [connection] if connection else []
    folder = state_folder() / "runs" / (connection or "default")
    stream = Service(run_id, [tool("flwr"), "log", run_id, *target], folder, flower_environment())
    with exit_on_sigterm():
        try:
            stream.start()
            for line in stream.follow():
                pass_on(line, readable(line), show)
            status = _await_end(run_id, target, stream, show)
        except (KeyboardInterrupt, SystemExit):
            stream.stop()
            if stops(run_id):
                stop(run_id, connection)
            raise
        finally:
            stream.stop()
    if status != "finished:completed":
        raise LaunchError(f"the run ended as {status}: {reason(stream.text())} (the whole log: {stream.log})")
    return Outcome(stream.log)


def stop(run_id: str, connection: str = "") -> None:
    """Stop a run on a deployment.

    Raises:
        LaunchError: If the SuperLink does not stop it.
    """
    command = [tool("flwr"), "stop", run_id, *([connection] if connection else [])]
    done = subprocess.run(command, env=flower_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"run {run_id} was not stopped: {(done.stderr or done.stdout).strip()}")


def flower_environment() -> dict[str, str]:
    """This process's environment with what Flower's processes, and Ray, must be told.

    Flower starts its other commands by name, so they must be found without an activated environment too.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | ENVIRONMENT | {"PATH": path}
    for name in _COLORS:
        environment.pop(name, None)
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOR_RAY:
        environment.setdefault("RAY_TMPDIR", "/tmp")
    return environment


def readable(line: str) -> str | None:
    """What bora_fl itself wrote in a line of a run's log."""
    _, mark, text = line.rstrip().partition("bora-fl | ")
    return text if mark else None


def reason(text: str) -> str:
    """What a failed run's log says of the error: the last line that names one and what belongs to it."""
    lines = text.splitlines()
    named = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    if not named:
        return (
            "its log names no error, so the ServerApp was killed or could not reach the SuperLink for too long; "
            "-c run.resume=true goes on after the last finished round"
        )
    rest = itertools.takewhile(lambda line: line.strip() and not _STAMP.search(line), lines[named[-1] + 1 :])
    return "\n".join([lines[named[-1]], *rest])


def _await_end(run_id: str, target: list[str], stream: Service, show: Show) -> str:
    """What Flower says of a run, once it has ended; the SuperLink may be away for a while in between.

    The log stream breaks with the SuperLink, and the run may outlive both.
    """
    heard, streamed = time.monotonic(), True
    while time.monotonic() - heard < LOST_SECONDS:
        status = _status([tool("flwr"), "ls", *target, "--run-id", run_id, "--format", "json"])
        if status.startswith("finished"):
            if not streamed:
                whole = [tool("flwr"), "log", run_id, *target, "--show"]
                with stream.log.open("ab") as file:
                    subprocess.run(whole, env=flower_environment(), stdout=file, stderr=subprocess.STDOUT, check=False)
            return status
        if status:
            heard = time.monotonic()
        elif streamed and "not found" in stream.tail().lower():
            raise LaunchError(stream.tail())
        if streamed:
            show(f"the stream of the log has ended; waiting for the end of run {run_id}")
        streamed = False
        time.sleep(2)
    raise LaunchError(
        f"the SuperLink has not answered for {LOST_SECONDS:.0f} s; start it again, see what became of run {run_id} "
        "with `flwr ls`, and go on from the last checkpoint with -c run.resume=true"
    )


def _status(command: list[str]) -> str:
    """The run's status; empty if the SuperLink does not answer."""
    result = subprocess.run(command, env=flower_environment(), capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        return str(json.loads(result.stdout)["runs"][0]["status"])
    return ""


def _toml(value: Scalar) -> str:
    return json.dumps(value)  # for bool, int, float and str, JSON and TOML agree
