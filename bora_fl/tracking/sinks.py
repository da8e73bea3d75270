"""A sink takes each round's numbers; the names of `run.sinks` say which there are.

A sink of one's own is a class with the methods of `Sink` and a constructor without arguments.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bora_fl.config import ConfigError, Scalar, extensions, extras
from bora_fl.tracking.trackers import TRACKERS

log = logging.getLogger(__name__)


class Sink(Protocol):
    """What is told of a run at the server."""

    def start(self, folder: Path, config: Mapping[str, Scalar]) -> None:
        """The run, in its output folder, with every setting by ``group.key``, begins or goes on."""

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """A round has ended; see `scalars`."""

    def finish(self) -> None:
        """The run has ended, well or not."""


class Sinks:
    """All sinks of a run. One that fails is dropped with a warning: no run ends for a tracker.

    Args:
        names: Comma-separated: keys of `TRACKERS`, entry points of the group ``bora_fl.sinks``, references.

    Raises:
        ConfigError: If there is no such sink, or its library is not installed.
    """

    def __init__(self, names: str) -> None:
        self._sinks: dict[str, Sink] = {}
        self._started = False
        for name in filter(None, map(str.strip, names.split(","))):
            self._sinks[name] = _open(name)

    def start(self, folder: Path, config: Mapping[str, Scalar]) -> None:
        """Tell all."""
        self._started = True
        self._tell("start", folder, config)

    def round(self, row: Mapping[str, Any]) -> None:
        """Tell all of a row of ``metrics.jsonl``."""
        self._tell("log", row["round"], scalars(row))

    def finish(self) -> None:
        """Tell all, if the run has begun."""
        if self._started:
            self._tell("finish")

    def _tell(self, what: str, *arguments: Any) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                getattr(sink, what)(*arguments)
            except Exception as error:  # whatever a tracker's network does
                del self._sinks[name]
                log.warning("run.sinks: %s failed (%s: %s) and gets no more", name, type(error).__name__, error)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row: its own, the strategy's, ε, and what each client reported, by ``client/<id>/<name>``."""
    found = {name: row[name] for name in row if name != "round" and isinstance(row[name], int | float)}
    found |= {f"strategy/{name}": value for name, value in row.get("strategy", {}).items()}
    if spent := row.get("epsilon"):
        found["epsilon"] = spent["largest"]
    for client, metrics in row.get("per_client", {}).items():
        found |= {f"client/{client}/{name}": value for name, value in metrics.items() if name != "partition"}
    return {name: float(value) for name, value in found.items()}


def _open(name: str) -> Sink:
    if name not in TRACKERS and not extensions.reference("sinks", name):
        known = ", ".join([*TRACKERS, *extensions.installed("sinks")])
        raise ConfigError(f"run.sinks = {name!r}: no such sink; use {known}, or package.module:attribute")
    try:
        sink: Sink = (TRACKERS.get(name) or extensions.load("sinks", name, "run.sinks ="))()
    except ImportError as error:
        raise ConfigError(
            f"run.sinks = {name!r}: {error.name or name} is not installed; run `{extras.remedy('tracking')}`"
        ) from error
    missing = [method for method in ("start", "log", "finish") if not callable(getattr(sink, method, None))]
    if missing:
        raise ConfigError(f"run.sinks = {name!r}: {type(sink).__name__} has no {', '.join(missing)}; see `Sink`")
    return sink
