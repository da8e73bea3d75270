import logging

import pytest

from bora_fl.tracking import activity
from bora_fl.tracking.activity import MARK, Activity, read


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """What is told, read back from the log, under a clock that is set by hand."""
    clock = [100.0]
    monkeypatch.setattr(activity.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(activity, "_teller", activity._Teller())
    monkeypatch.setattr(logging.getLogger("bora_fl.activity"), "propagate", True)
    caplog.set_level(logging.INFO, logger="bora_fl.activity")
    return clock, lambda: [read(f"12:00 {MARK}{record.getMessage()}\n") for record in caplog.records]


def test_what_is_told_is_read_back_with_its_round(told):
    activity.begin(2, 5)
    activity.tell("train", 1, 3, [2, 0])
    assert told[1]() == [Activity("train", 2, 5, 1, 3, (0, 2))]
    assert str(told[1]()[0]) == "round 2/5: train, 1 of 3 clients have answered, at work: 0, 2"
    assert str(Activity("train", 1, 2, clients=tuple(range(10)))).endswith("5, 6, 7 and 2 more")


def test_nothing_is_told_twice_but_what_lasts(told):
    clock, seen = told
    for _ in range(5):
        activity.tell("merge")
    assert len(seen()) == 1
    activity.tell("train")
    clock[0] += activity.REPEAT
    activity.tell("train")
    assert [now.what for now in seen()] == ["merge", "train", "train"]


@pytest.mark.parametrize("line", ["", "bora-fl | round 1", f"{MARK}no JSON", f"{MARK}[]", f'{MARK}{{"what": 1}}'])
def test_any_other_line_is_none(line: str):
    assert read(line) is None
