"""`flwr run` with what it needs set, followed to its end, and a true exit code.

Flower's command exits 0 even when the ServerApp crashed, and its local SuperLink outlives it. Here a simulation gets a
SuperLink of its own that ends with the run, and a run counts as done only if Flower says that it completed and the last
round stands in ``metrics.jsonl``.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bora_fl.config import ConfigError, Scalar, parse
from bora_fl.report import read_rows, round_line

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
STARTUP_SECONDS = 60.0
LOST_SECONDS = 180.0
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception): ")
_STAMP = re.compile(r"INFO|WARN|ERROR|bora-fl \|")


class LaunchError(RuntimeError):
    """A run that did not succeed, with the reason and the place of the log."""


@dataclass
class Simulation:
    """Size and resources of a simulated federation."""

    num_clients: int = 4
    cpus_per_client: int = 1
    gpus_per_client: float = 0.0


@dataclass
class Outcome:
    """Where a finished run left its results."""

    folder: Path
    log: Path
    rows: list[dict[str, object]] = field(default_factory=list)


def run(
    app: Path,
    run_config: Mapping[str, Scalar],
    *,
    simulation: Simulation | None = None,
    connection: str | None = None,
    show: Callable[[str], None] = print,
) -> Outcome:
    """Run a federation to its end.

    Args:
        app: The Flower app: a checkout or an unpacked bundle.
        run_config: Overrides of the run config; checked before anything starts.
        simulation: Simulate on this machine, on a SuperLink of its own; None for a deployment.
        connection: Name of a SuperLink connection in Flower's config.toml, for a deployment.
        show: Is given each line of the run's log that a person wants to read.

    Returns:
        Where the results are. For a deployment the folder is on the SuperLink's machine.

    Raises:
        ConfigError: For a setting that cannot be used.
        LaunchError: If the run failed in any way.
    """
    settings = parse(run_config)
    folder = Path(settings.run.output_dir).expanduser().resolve()
    if (simulation is None) == (connection is None):
        raise ConfigError("give either a simulation or the name of a SuperLink connection")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "run.log"
    overrides = {**run_config, "run.output-dir": str(folder)} if simulation else dict(run_config)
    environment = flower_environment()
    if simulation is None:
        with tempfile.TemporaryDirectory() as copy:
            status = _submit(stage(app, Path(copy)), overrides, connection, None, environment, log, show)
        return _judge(status, folder, log, None)
    show(f"starting Flower with {simulation.num_clients} clients; the first round also loads the model and the data")
    with _superlink(environment) as home, _followed(folder / "metrics.jsonl", settings.run.num_rounds, show):
        environment["FLWR_HOME"] = str(home)
        status = _submit(stage(app, home), overrides, "bora-fl", simulation, environment, log, show)
        with contextlib.suppress(OSError):
            shutil.copyfile(home / "superlink.log", folder / "superlink.log")
    return _judge(status, folder, log, settings.run.num_rounds)


def flower_environment() -> dict[str, str]:
    """This process's environment with what Flower's processes must be told.

    Flower starts its other commands by name, so they must be found without an activated environment too.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | ENVIRONMENT | {"PATH": path}


@contextlib.contextmanager
def _followed(metrics: Path, num_rounds: int, show: Callable[[str], None]) -> Iterator[None]:
    """Show each round as it ends; Flower's log stream lags behind by minutes."""
    done, seen = threading.Event(), len(read_rows(metrics))

    def follow(count: int) -> None:
        while True:
            last_look = done.wait(0.5)
            rows = read_rows(metrics)
            for row in rows[count:]:
                show(round_line(row, num_rounds))
            count = max(count, len(rows))
            if last_look:
                return

    thread = threading.Thread(target=follow, args=(seen,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _judge(status: str, folder: Path, log: Path, num_rounds: int | None) -> Outcome:
    if status != "finished:completed":
        raise LaunchError(f"the run ended as {status}: {_reason(log)} (the whole log: {log})")
    if num_rounds is None:
        return Outcome(folder, log)
    rows = read_rows(folder / "metrics.jsonl")
    if not rows or rows[-1]["round"] != num_rounds or not (folder / "adapter").is_dir():
        raise LaunchError(f"the run ended without a result; the last lines of {log}:\n{_tail(log)}")
    return Outcome(folder, log, rows)


def stage(app: Path, into: Path) -> Path:
    """A copy of what a bundle takes of an app.

    Flower matches every file below the app's folder against its ignore rules, an environment's fifty thousand included,
    which takes longer than the rest of the start.
    """
    target = into / "app"
    for folder, folders, files in os.walk(app):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in files:
            if name == "LICENSE" or name.endswith((".py", ".toml", ".md")):
                path = target / Path(folder).relative_to(app) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / name, path)
    return target


def _submit(
    app: Path,
    overrides: Mapping[str, Scalar],
    connection: str | None,
    simulation: Simulation | None,
    environment: Mapping[str, str],
    log: Path,
    show: Callable[[str], None],
) -> str:
    command = [tool("flwr"), "run", str(app), *([connection] if connection else []), "--stream"]
    command += ["--run-config", " ".join(f"{key}={_toml(value)}" for key, value in overrides.items())]
    if simulation:
        resources = {
            "num-supernodes": simulation.num_clients,
            "client-resources-num-cpus": simulation.cpus_per_client,
            "client-resources-num-gpus": simulation.gpus_per_client,
        }
        command += ["--federation-config", " ".join(f"{key}={value}" for key, value in resources.items())]
    run_id = ""
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                if "Successfully started run" in line:
                    run_id = next(word for word in line.split() if word.strip(".").isdigit()).strip(".")
                if (text := _readable(line)) and not (simulation and text.startswith("round ")):
                    show(text)
        except BaseException:  # Ctrl-C or SIGTERM: leaving the block would wait for the run's end
            process.terminate()
            raise
    if not run_id:
        raise LaunchError(f"`flwr run` did not start the run:\n{_tail(log)}")
    return _await_end(run_id, connection, environment, log, show)


def _await_end(
    run_id: str, connection: str | None, environment: Mapping[str, str], log: Path, show: Callable[[str], None]
) -> str:
    """What Flower says of a run, once it has ended; the SuperLink may be away for a while in between.

    The log stream breaks with the SuperLink, and the run may outlive both.
    """
    target = [connection] if connection else []
    heard, streamed = time.monotonic(), True
    while time.monotonic() - heard < LOST_SECONDS:
        status = _status([tool("flwr"), "ls", *target, "--run-id", run_id, "--format", "json"], environment)
        if status.startswith("finished"):
            if not streamed:
                whole = [tool("flwr"), "log", run_id, *target, "--show"]
                with log.open("w") as file:
                    subprocess.run(whole, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
            return status
        if status:
            heard = time.monotonic()
        if streamed:
            show(f"the stream of the log has ended; waiting for the end of run {run_id}")
        streamed = False
        time.sleep(2)
    raise LaunchError(
        f"the SuperLink has not answered for {LOST_SECONDS:.0f} s; start it again, see what became of run {run_id} "
        "with `flwr ls`, and go on from the last checkpoint with -c run.resume=true"
    )


def _status(command: list[str], environment: Mapping[str, str]) -> str:
    """The run's status; empty if the SuperLink does not answer."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        return str(json.loads(result.stdout)["runs"][0]["status"])
    return ""


@contextlib.contextmanager
def _superlink(environment: Mapping[str, str]) -> Iterator[Path]:
    """A SuperLink in simulation mode, with a home of its own, gone with all its descendants at the end."""
    home = Path(tempfile.mkdtemp(prefix="bora-fl-"))
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bora-fl"\n\n[superlink.bora-fl]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = [tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--log-file", str(home / "superlink.log")]
    process = subprocess.Popen(
        command,
        env={**environment, "FLWR_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the SuperLink is stopped on SIGTERM too
    try:
        _wait_until_up(process, port, home)
        yield home
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end(process.pid)
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_up(process: "subprocess.Popen[bytes]", port: int, home: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        time.sleep(0.2)
    log = home / "superlink.log"
    raise LaunchError(f"the SuperLink did not start on port {port}:\n{_tail(log)}")


def _end(pid: int) -> None:
    """End a process and its descendants, asking first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """The path of a command installed beside this Python, else its name for the PATH to find."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else name


def _toml(value: Scalar) -> str:
    return json.dumps(value)  # for bool, int, float and str, JSON and TOML agree


def _readable(line: str) -> str | None:
    """The lines of the stream that bora_fl itself wrote."""
    _, mark, text = line.rstrip().partition("bora-fl | ")
    return text if mark else None


def _reason(log: Path) -> str:
    """What a failed run's log says of the error: the last line that names one and what belongs to it."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    named = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    if not named:
        return (
            "its log names no error, so the ServerApp was killed or could not reach the SuperLink for too long; "
            "-c run.resume=true goes on after the last finished round"
        )
    rest = itertools.takewhile(lambda line: line.strip() and not _STAMP.search(line), lines[named[-1] + 1 :])
    return "\n".join([lines[named[-1]], *rest])


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else f"({log} is missing)"
