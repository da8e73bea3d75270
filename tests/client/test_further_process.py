"""Which failures a further process of a worker outlives: those that the first one has too."""

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import RecordDict

from bora_fl.client import further_process
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.processes import Processes
from bora_fl.config import parse
from bora_fl.wire.refusals import Code, Refused


@pytest.mark.parametrize(
    ("code", "shards", "lives"),
    [
        (Code.FOLDS_MISSING, True, True),
        (Code.STATE_MISSING, True, True),
        (Code.DATA_UNREADABLE, True, False),
        (Code.FOLDS_MISSING, False, False),  # the first process trains, and would wait for this one
    ],
)
def test_a_refusal(code: Code, shards: bool, lives: bool, monkeypatch: pytest.MonkeyPatch):
    jobs: list[Any] = [({"job": "train"}, None), None]

    def refuse(*_: object) -> None:
        raise Refused(code)

    for name, instead in {
        "signal": SimpleNamespace(SIGINT=2, SIGTERM=15, SIG_IGN=None, signal=lambda *_: None),
        "FileStore": lambda *_: SimpleNamespace(set=lambda *_: None),
        "connect": lambda *_: None,
        "sharding": SimpleNamespace(connect=lambda *_: "mesh"),
        "read_job": lambda _: jobs.pop(0),
        "extensions": SimpleNamespace(take_installed_only=lambda: None),
        "_follow": refuse,
    }.items():
        monkeypatch.setattr(further_process, name, instead)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=None))
    if lives:
        further_process.main("store", 1, 2, 0)
        assert jobs == []
    else:
        with pytest.raises(Refused):
            further_process.main("store", 1, 2, 0 if shards else None)

    processes, ended = Processes(2, shards), []
    monkeypatch.setattr(processes, "start", lambda: None)
    monkeypatch.setattr(processes, "close", lambda: ended.append(True))
    with pytest.raises(Refused), processes.at_work(parse({}), RecordDict(), ClientIdentity(0, 1), RecordDict()):
        raise Refused(code)
    assert bool(ended) is not lives
