"""A run's progress: lines in a pipe, a live view in a terminal, JSON lines for a program."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from bora_fl.report import read_rows, rounds_table
from bora_fl.tracking.activity import Activity, read

QUIET = 30.0
ROUNDS_SHOWN = 10


@runtime_checkable
class Watcher(Protocol):
    """Is given what a person wants to read, and what the run is doing."""

    def __call__(self, text: str, /) -> None:
        """A line of the run's log."""

    def activity(self, now: Activity, /) -> None:
        """What is being done."""


def pass_on(line: str, text: str | None, show: Callable[[str], object]) -> None:
    """Give a line of a log to whoever watches.

    Args:
        line: As it stands in the log.
        text: What a person wants to read of it.
        show: A `Watcher`, or a function that takes what a person wants to read.
    """
    if text:
        show(text)
    elif isinstance(show, Watcher) and (now := read(line)):
        show.activity(now)


class Lines:
    """Lines for a person, in a pipe or a file; says what the run is doing where it has said nothing for half a minute.

    A context manager, since it looks at the clock in a thread.

    Args:
        write: Is given each line, without its end.
        clock: Seconds.
    """

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._said, self._now = clock(), Activity("start")
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def __call__(self, text: str) -> None:
        """A line."""
        with self._lock:
            self._said = self._clock()
            self._write(text)

    def activity(self, now: Activity) -> None:
        """What is being done."""
        self._now = now

    def look(self) -> None:
        """Say what is being done if it is time to."""
        if (quiet := self._clock() - self._said) >= QUIET:
            self(f"{self._now} ({quiet:.0f} s)")

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            self.look()


class LiveView:
    """The rounds so far and what the run is doing, redrawn in a terminal; a context manager.

    Args:
        console: A terminal.
        folder: The run's output folder, if it is on this machine: its rounds are shown as a table, and not as lines.
        clock: Seconds.
    """

    def __init__(self, console: Console, folder: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._metrics = folder / "metrics.jsonl" if folder else None
        self._begun = clock()
        self._now = Activity("start")
        self._spinner = Spinner("dots")
        self._rounds: list[tuple[int, float]] = []  # those that were seen to begin, and when
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self.render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def close(self) -> None:
        """Leave the terminal to others."""
        self._live.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, text: str) -> None:
        """A line; a round's, where the table has it, is not printed."""
        if self._metrics is None or not text.startswith("round ") or ": train loss" not in text:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def activity(self, now: Activity) -> None:
        """What is being done."""
        if now.round > (self._rounds[-1][0] if self._rounds else 0):
            self._rounds.append((now.round, self._clock()))
        self._now = now

    def render(self) -> RenderableType:
        """The view of this moment."""
        elapsed = self._clock() - self._begun
        left = self._left()
        words = f"{self._now} · {_time(elapsed)}" + (f" · about {_time(left)} left" if left is not None else "")
        self._spinner.update(text=Text(words, overflow="ellipsis", no_wrap=True))
        rows = read_rows(self._metrics)[-ROUNDS_SHOWN:] if self._metrics else []
        bar = Table.grid(expand=True)
        bar.add_row(self._spinner)
        return Group(rounds_table(rows, ""), bar) if rows else bar

    def _left(self) -> float | None:
        """Seconds until the end, by the mean of the rounds that were seen whole; None before the first has ended."""
        if len(self._rounds) < 2:
            return None
        (first, begun), (last, began) = self._rounds[0], self._rounds[-1]
        a_round = (began - begun) / (last - first)
        return max(0.0, a_round * (self._now.rounds - last + 1) - (self._clock() - began))


class JsonProgress:
    """Turns what a person would see into JSON objects, one a line, each with an ``event``.

    ``line`` has the text; ``activity`` what is being done; ``round`` is a row of ``metrics.jsonl``, of runs whose
    folder is on this machine; the last is ``completed`` with the places of the results, or ``failed`` with the message
    and the exit code.

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

    def activity(self, now: Activity) -> None:
        """What is being done."""
        self.emit("activity", **asdict(now))

    def emit(self, event: str, **values: Any) -> None:
        """Any event."""
        self._write(json.dumps({"event": event, **values}))

    def _rows(self) -> list[dict[str, Any]]:
        return read_rows(self._metrics) if self._metrics else []


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
