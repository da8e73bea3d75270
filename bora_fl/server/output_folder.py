"""The output folder of a run belongs to one run at a time, and to no other run afterwards."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from bora_fl.config import ConfigError
from bora_fl.paths import write_atomically

LOCK, HOLDER = ".lock", ".lock.json"


def make(folder: Path, setting: str = "run.output-dir =") -> None:
    """Make a folder for results, if it is missing.

    Args:
        folder: The folder.
        setting: The setting or option that names it, for the message.

    Raises:
        ConfigError: If it cannot be made, or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "it is read-only"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ConfigError(f"{setting} '{folder}': nothing can be written there ({reason}); name another folder")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold an output folder while a run writes to it. The lock ends with the process, however it ends.

    Args:
        folder: Made if it is missing.

    Raises:
        ConfigError: If another run holds it, naming the run's process, or nothing can be written to it.
    """
    make(folder)
    try:
        lock = FileLock(folder / LOCK, mode=0o600).acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"run.output-dir = '{folder}': {_holder(folder)} writes to it; wait for its end, or end it, or set another "
            "run.output-dir"
        ) from None
    with lock:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"process": os.getpid(), "machine": socket.gethostname(), "since": now}
        write_atomically(folder / HOLDER, json.dumps(holder) + "\n", mode=0o600)
        yield


def refuse_another_run(folder: Path, *, resumes: bool = False) -> None:
    """Check that an output folder is free for a new run.

    Args:
        folder: The folder.
        resumes: Whether the run was to go on from a checkpoint, which there is none of.

    Raises:
        ConfigError: If it holds a checkpoint or metrics, readable or not.
    """
    metrics = folder / "metrics.jsonl"
    if any((folder / "checkpoints").glob("round-*")) or (metrics.exists() and metrics.stat().st_size > 0):
        remedy = "set run.resume=true to go on from its checkpoints"
        if resumes:
            remedy = "it has no checkpoint to go on from: restore its folder checkpoints"
        raise ConfigError(f"run.output-dir = '{folder}' holds a run already; {remedy}, or set another run.output-dir")


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return f"a run in process {holder['process']} on {holder['machine']}, since {holder['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
