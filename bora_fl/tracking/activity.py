"""What a run is doing at this moment: lines of its log for whoever follows it, beside those for people.

The process of the server tells, by `begin` and `tell`; the one that follows the run reads its log by `read`. Nothing is
told more often than changes, and nothing that lasts stays untold for longer than `REPEAT` seconds.
"""

import json
import logging
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

MARK = "bora-fl > "
REPEAT = 10.0
_log = logging.getLogger("bora_fl.activity")


@dataclass(frozen=True)
class Activity:
    """What is being done.

    Attributes:
        what: In a word or few: ``train``, ``merge``, ``evaluate on the test set``.
        round: Of the run; 0 before the first.
        rounds: How many there are.
        done: Clients that have answered.
        total: Clients that were asked; 0 where none is.
        clients: Partitions of the clients that are at work, where they are known.
    """

    what: str
    round: int = 0
    rounds: int = 0
    done: int = 0
    total: int = 0
    clients: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [f"round {self.round}/{self.rounds}: {self.what}" if self.rounds else self.what]
        if self.total:
            parts.append(f"{self.done} of {self.total} clients have answered")
        if self.clients:
            more = f" and {len(self.clients) - 8} more" if len(self.clients) > 8 else ""
            parts.append(f"at work: {', '.join(map(str, self.clients[:8]))}{more}")
        return ", ".join(parts)


class _Teller:
    """What was told last, and when."""

    def __init__(self) -> None:
        self.said, self.when, self.round, self.rounds = Activity(""), 0.0, 0, 0

    def tell(self, activity: Activity) -> None:
        now = time.monotonic()
        activity = replace(activity, round=self.round, rounds=self.rounds)
        if activity != self.said or now - self.when >= REPEAT:
            self.said, self.when = activity, now
            _log.info("%s", json.dumps(asdict(activity)))


_teller = _Teller()


def show_on_stderr() -> None:
    """Let what is told reach standard error, marked for whoever follows the run."""
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"{MARK}%(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False


def begin(round: int, rounds: int) -> None:
    """A round of so many begins."""
    _teller.round, _teller.rounds = round, rounds


def tell(what: str, done: int = 0, total: int = 0, clients: Iterable[int] = ()) -> None:
    """Say what is being done; see `Activity`."""
    _teller.tell(Activity(what, done=done, total=total, clients=tuple(sorted(clients))))


def read(line: str) -> Activity | None:
    """What a line of a run's log says is being done; None for any other line."""
    _, mark, text = line.partition(MARK)
    try:
        found: Any = json.loads(text) if mark else None
        return Activity(**(found | {"clients": tuple(found["clients"])})) if found else None
    except (ValueError, TypeError, KeyError):
        return None
