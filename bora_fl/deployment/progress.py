"""A run's progress as JSON lines, for a program that starts one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bora_fl.report import read_rows


class JsonProgress:
    """Turns the lines that a person would see into JSON objects, one a line, each with an ``event``.

    ``line`` has the text; ``round`` is a row of ``metrics.jsonl``, of runs whose folder is on this machine; the last is
    ``completed`` with the places of the results, or ``failed`` with the message and the exit code.

    Args:
        write: Is given each line, without its end.
        folder: The run's output folder, if it is on this machine.
    """

    def __init__(self, write: Callable[[str], object], folder: Path | None = None) -> None:
        self._write, self._metrics = write, folder / "metrics.jsonl" if folder else None
        self._seen = {row["round"] for row in self._rows()}

    def __call__(self, text: str) -> None:
        """A line, and the rounds that have ended meanwhile."""
        self.emit("line", text=text)
        for row in self._rows():
            if row["round"] not in self._seen:
                self._seen.add(row["round"])
                self.emit("round", **row)

    def emit(self, event: str, **values: Any) -> None:
        """Any event."""
        self._write(json.dumps({"event": event, **values}))

    def _rows(self) -> list[dict[str, Any]]:
        return read_rows(self._metrics) if self._metrics else []
