"""Run the cells of a comparison, each in its own folder, in worker processes; resumable."""

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import bora_fl
from bora_fl.config import ConfigError
from bora_fl.paths import write_atomically
from bora_fl.report import read_rows
from bora_fl.simulations.compare.plan import LEDGER, Cell
from bora_fl.simulations.engine import simulate
from bora_fl.simulations.pool import run_all

log = logging.getLogger(__name__)

FINISHED = "finished.json"
FAILED = "failed.json"


def environment(threads: int) -> dict[str, str]:
    """What worker processes need to share the cores without spinning on each other's."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def is_finished(cell: Cell) -> bool:
    """Whether the cell has run to its end with the same settings."""
    marked = _read(cell.folder / FINISHED).get("identity") == cell.identity
    return marked and len(read_rows(cell.folder / "metrics.jsonl")) == cell.settings.run.num_rounds


def outcome(cell: Cell) -> dict[str, Any]:
    """How the cell ended: `status` (finished, failed, missing), `reason`, `seconds`, `versions`."""
    if is_finished(cell):
        return {"status": "finished", "reason": "", **_read(cell.folder / FINISHED)}
    failed = _read(cell.folder / FAILED)
    return {"status": "failed", **failed} if failed else {"status": "missing", "reason": "not run"}


def run_cell(cell: Cell) -> None:
    """Run one cell from its start, in this process, and mark it as finished.

    Metrics, config, ledgers and log stay; checkpoints and the adapter go, since nothing reads them and full
    fine-tuning's are large.
    """
    folder = cell.folder
    for name in ("metrics.jsonl", FAILED):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "adapter", LEDGER):
        shutil.rmtree(folder / name, ignore_errors=True)
    started = time.perf_counter()
    simulate(cell.run_settings, cell.num_clients, node_configs=cell.node_configs)
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    versions = {"bora_fl": bora_fl.__version__, "torch": torch.__version__}
    end = {"identity": cell.identity, "seconds": time.perf_counter() - started, "versions": versions}
    _write(folder / FINISHED, end)


def sweep(cells: list[Cell], root: Path, *, workers: int, threads: int, console: Console) -> None:
    """Run the cells that are not finished.

    Args:
        cells: The cells, in order.
        root: The comparison's folder.
        workers: Cells at once.
        threads: Torch threads of each.
        console: Shows the progress bar; where it is no terminal, a line per cell.

    Raises:
        ConfigError: If another process is at work in the folder.
    """
    root.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not is_finished(cell)]
    lock = FileLock(root / ".lock")
    try:
        with lock.acquire(timeout=0):
            _sweep(cells, todo, workers, threads, console)
    except Timeout as error:
        raise ConfigError(
            f"--output {root}: another comparison is at work there; wait for it, or name another"
        ) from error


def _sweep(cells: list[Cell], todo: list[Cell], workers: int, threads: int, console: Console) -> None:
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} runs are finished already")
    if not todo:
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[cells]} runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    total, done, ended = sum(cell.cost for cell in todo), 0.0, 0
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        bar = progress.add_task("comparing", total=total, cells=f"0/{len(todo)}")

        def on_done(cell: Cell, reason: str) -> None:
            nonlocal done, ended
            done, ended = done + cell.cost, ended + 1
            if reason:
                _write(cell.folder / FAILED, {"reason": reason})
                progress.print(f"[red]failed[/] {cell}: {reason}", highlight=False)
            elif not console.is_terminal:
                console.print(f"{ended}/{len(todo)} {cell}", highlight=False, markup=False)
            progress.update(bar, completed=done, cells=f"{ended}/{len(todo)}")

        def on_tick(running: list[Cell]) -> None:
            progress.update(bar, completed=done + sum(_begun(cell) for cell in running))

        run_all(todo, _work, workers, environment=environment(threads), on_done=on_done, on_tick=on_tick)
        progress.update(bar, completed=total)


def _begun(cell: Cell) -> float:
    """The part of a running cell's cost that is done: its rounds so far."""
    rounds = len(read_rows(cell.folder / "metrics.jsonl"))
    return cell.cost * rounds / cell.settings.run.num_rounds


def _work(cell: Cell) -> str:
    """Run a cell in a worker, its output in ``run.log``; returns why it failed."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    path = cell.folder / "run.log"
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(cell.settings.run.threads)
    try:
        run_cell(cell)
    except Exception as error:  # whatever it is, the other cells go on and the report says it
        log.exception("the cell failed")
        return f"{type(error).__name__}: {error} (see {path})"
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
