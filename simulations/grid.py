"""A grid of runs, each in a folder of its own, in worker processes; what is finished is not run again.

A run's folder holds what the run itself writes, ``run.log`` and, at its end, ``finished.json`` (its identity, seconds,
versions and result) or ``failed.json`` (the reason). Its name ends in a digest of the identity, so that other settings
make another folder and no result is overwritten.
"""

import hashlib
import json
import logging
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import bora_fl
from bora_fl.config import ConfigError
from bora_fl.paths import delete, write_atomically
from bora_fl.server.output_folder import make
from bora_fl.simulations.pool import run_all

log = logging.getLogger(__name__)

FINISHED, FAILED, LOG = "finished.json", "failed.json", "run.log"
Result = dict[str, Any]


class Run(ABC):
    """One run of a grid: a picklable value.

    Attributes:
        root: The grid's folder.
    """

    root: Path

    @property
    @abstractmethod
    def name(self) -> str:
        """Its folder below ``runs/``, without the digest."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, object]:
        """What decides the result, as JSON; a finished run of the same identity is not run again."""

    @abstractmethod
    def work(self) -> Result:
        """Run in this process, in `folder`, from the start; the result is JSON."""

    @property
    def cost(self) -> float:
        """What the estimate of the time left goes by, in any unit."""
        return 1.0

    def progress(self) -> float:
        """The share of a run under way that is done, from what is in its folder."""
        return 0.0

    def stands(self, result: Result) -> bool:
        """Whether a stored result is good enough that the run is skipped."""
        return True

    def line(self, result: Result) -> str:
        """A result in a few words; empty if the tables say it all."""
        return ""

    @cached_property
    def folder(self) -> Path:
        """Where it runs."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        return self.root / "runs" / f"{self.name}-{digest}"

    def __str__(self) -> str:
        return self.name


AnyRun = TypeVar("AnyRun", bound=Run)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``missing`` if it has not been run, or not with this identity.
        reason: Why it failed or is missing.
        seconds: Wall clock.
        versions: Of the packages that it ran with.
        result: What it returned.
    """

    status: Literal["finished", "failed", "missing"]
    reason: str = ""
    seconds: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    result: Result = field(default_factory=dict)


def outcome(run: Run) -> Outcome:
    """How a run ended, from its folder."""
    found = _read(run.folder / FINISHED)
    if found and found.get("identity") == json.loads(json.dumps(run.identity)):
        return Outcome("finished", "", found["seconds"], found["versions"], found["result"])
    failed = _read(run.folder / FAILED)
    return Outcome("failed", failed["reason"]) if failed else Outcome("missing", "not run")


def is_finished(run: Run) -> bool:
    """Whether a run can be skipped."""
    found = outcome(run)
    return found.status == "finished" and run.stands(found.result)


def execute(run: Run) -> None:
    """Run from the start in this process, in an emptied folder, and mark the run as finished."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for path in run.folder.iterdir():
        if path.name != LOG:
            delete(path)
    started = time.perf_counter()
    result = run.work()
    end = {
        "identity": run.identity,
        "seconds": time.perf_counter() - started,
        "versions": {"bora_fl": bora_fl.__version__, "torch": version("torch")},
        "result": result,
    }
    write_atomically(run.folder / FINISHED, json.dumps(end, indent=1) + "\n")


def run_grid(
    runs: Sequence[AnyRun], root: Path, *, workers: int, threads: int, console: Console, title: str
) -> list[tuple[AnyRun, Outcome]]:
    """Run what is not finished; a run that fails, or whose process dies, leaves the others alone.

    Args:
        runs: The runs, in order.
        root: The grid's folder, locked meanwhile.
        workers: Runs at once.
        threads: Torch threads of each.
        console: Shows the progress bar; where it is no terminal, a line per run.
        title: What the progress bar says.

    Returns:
        Each run and how it ended, those that were finished before included.

    Raises:
        ConfigError: If another process is at work in the folder, or nothing can be written to it.
    """
    make(root, "--output")
    try:
        with FileLock(root / ".lock").acquire(timeout=0):
            _run([run for run in runs if not is_finished(run)], len(runs), workers, threads, console, title)
    except Timeout as error:
        raise ConfigError(f"--output {root}: another command is at work there; wait for it, or name another") from error
    return [(run, outcome(run)) for run in runs]


def environment(threads: int) -> dict[str, str]:
    """What worker processes need to share the cores without spinning on each other's."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def _run(todo: list[AnyRun], planned: int, workers: int, threads: int, console: Console, title: str) -> None:
    if len(todo) < planned:
        console.print(f"{planned - len(todo)} of {planned} runs are finished already")
    if not todo:
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[runs]} runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    total, done, ended = sum(run.cost for run in todo), 0.0, 0
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        bar = progress.add_task(title, total=total, runs=f"0/{len(todo)}")

        def on_done(run: AnyRun, reason: str) -> None:
            nonlocal done, ended
            done, ended = done + run.cost, ended + 1
            if reason:
                write_atomically(run.folder / FAILED, json.dumps({"reason": reason}, indent=1) + "\n")
                progress.print(f"[red]failed[/] {escape(f'{run}: {reason}')}", highlight=False)
            elif (line := run.line(outcome(run).result)) or not console.is_terminal:
                text = f"{ended}/{len(todo)} {run}" + (f": {line}" if line else "")
                progress.print(text, highlight=False, markup=False)
            progress.update(bar, completed=done, runs=f"{ended}/{len(todo)}")

        def on_tick(running: list[AnyRun]) -> None:
            progress.update(bar, completed=done + sum(run.cost * run.progress() for run in running))

        run_all(todo, _work, workers, environment=environment(threads), on_done=on_done, on_tick=on_tick)
        progress.update(bar, completed=total)


def _work(run: Run) -> str:
    """Execute a run in a worker, its output in ``run.log``; returns why it failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / LOG
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", force=True)
    try:
        execute(run)
    except Exception as error:  # whatever it is, the other runs go on and the report says it
        log.exception("the run failed")
        return f"{type(error).__name__}: {error} (see {path})"
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
