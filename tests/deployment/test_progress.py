import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bora_fl.deployment.progress import QUIET, JsonProgress, Lines, LiveView, pass_on
from bora_fl.report import RoundReport, append_row
from bora_fl.tracking.activity import MARK, Activity

ROUND = "round 1/4: train loss 0.5, loss 0.4, accuracy 0.9"


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def text(view: LiveView) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    console.print(view.render())
    return console.file.getvalue()


@pytest.mark.parametrize("local", [True, False])
def test_the_view_has_the_rounds_and_what_is_being_done(local: bool, clock: Clock, tmp_path: Path):
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with LiveView(terminal, tmp_path if local else None, clock) as view:
        clock.now += 65
        view.activity(Activity("train", 1, 4, 2, 3, (7,)))
        append_row(tmp_path / "metrics.jsonl", RoundReport(1, 0.1234, train_loss=0.5678).row())
        view(ROUND)
        view("warning: this one is shown")
        shown = text(view)
    assert "round 1/4: train, 2 of 3 clients have answered, at work: 7 · 1:05" in shown
    assert "left" not in shown
    assert ("0.568" in shown) == local  # in the table of the rounds
    lines = terminal.file.getvalue()
    assert "warning: this one is shown" in lines
    assert (ROUND in lines) != local


def test_the_time_left_goes_by_the_rounds_that_were_seen(clock: Clock):
    view = LiveView(Console(file=io.StringIO()), None, clock)
    for number in (3, 4, 5):  # a run that is followed, or goes on, from its third round
        view.activity(Activity("train", number, 10))
        clock.now += 20
    assert "about 1:40 left" in text(view)  # the end of this one, and five more, 20 s each
    clock.now += 500
    assert "about 0:00 left" in text(view)


def test_in_a_pipe_there_is_no_silent_minute_and_no_line_too_many(clock: Clock):
    said: list[str] = []
    lines = Lines(said.append, clock)
    lines("begin")
    for _ in range(int(QUIET)):
        clock.now += 1
        lines.activity(Activity("evaluate on the test set", 2, 4))
        lines.look()
    lines.look()
    assert said == ["begin", "round 2/4: evaluate on the test set (30 s)"]
    with Lines(said.append):
        pass  # its thread ends


def test_a_program_is_told_of_both(tmp_path: Path):
    said: list[str] = []
    progress = JsonProgress(said.append)
    now = Activity("train", 1, 2, 0, 3, (1, 2))
    inside = json.dumps({"what": "train", "round": 1, "rounds": 2, "done": 0, "total": 3, "clients": [1, 2]})
    for line, readable in ((f"{MARK}{inside}", None), ("bora-fl | hello", "hello"), ("noise", None)):
        pass_on(line, readable, progress)
        pass_on(line, readable, lambda text: said.append(text))  # whoever wants no more than the text
    first, *rest = said
    assert json.loads(first) == {"event": "activity", **vars(now), "clients": [1, 2]}
    assert [json.loads(rest[0]), rest[1:]] == [{"event": "line", "text": "hello"}, ["hello"]]
