"""What a tracker is told, with fakes in the place of the libraries."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bora_fl.config import ConfigError, Settings
from bora_fl.report import ClientMetrics, RoundReport
from bora_fl.simulations.engine import simulate
from bora_fl.tracking.sinks import Sinks, scalars
from bora_fl.tracking.trackers import TRACKERS

ROW = RoundReport(
    2, 0.5, None, strategy={"merge_error": 0.25}, per_client={3: ClientMetrics(3.0, 4.0, train_loss=0.75)}
).row()
LIBRARY = {"tensorboard": "torch.utils.tensorboard"}


class Recorder(ModuleType):
    """A module whose every function, and every object that one returns, notes its calls."""

    def __init__(self, name: str, calls: list[tuple]) -> None:
        super().__init__(name)
        self.calls = calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            return self

        return call


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_config_and_every_number_with_its_round(name: str, tmp_path: Path, monkeypatch):
    calls: list[tuple] = []
    module = LIBRARY.get(name, name)
    monkeypatch.setitem(sys.modules, module, Recorder(module, calls))
    sinks = Sinks(name)
    sinks.start(tmp_path, {"run.seed": 7})
    sinks.round(ROW)
    sinks.finish()
    text = repr(calls)
    assert "merge_error" in text
    assert "client/3/train-loss" in text
    assert name == "tensorboard" or "'run.seed': 7" in text
    assert all(options.get("step", 2) == 2 for _, _, options in calls)
    assert calls[-1][0] in ("close", "finish", "end_run")


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_s_own_library_takes_what_it_is_told(name: str, tmp_path: Path, monkeypatch, caplog):
    for key, value in (("WANDB_MODE", "offline"), ("TRACKIO_DIR", str(tmp_path / "trackio")), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(key, value)  # some are read at import
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(LIBRARY.get(name, name))
    sinks = Sinks(name)
    sinks.start(tmp_path, Settings().flat())
    for _ in range(2):
        sinks.round(ROW)
    sinks.finish()
    assert "gets no more" not in caplog.text
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert any(re.match(r"events\.out|run-\w+\.wandb|bora-fl\.db|mlflow\.db", file) for file in written), written


def test_the_numbers_of_a_row():
    assert scalars(ROW) == {
        **dict.fromkeys(("bytes_up", "bytes_down", "seconds", "server_seconds", "clients", "rejected"), 0.0),
        "loss": 0.5,
        "strategy/merge_error": 0.25,
        "client/3/rank": 4.0,
        "client/3/train-loss": 0.75,
    }


class Mine:
    told: "list[tuple]" = []  # noqa: RUF012

    def start(self, folder, config):
        self.told.append(("start", folder.name, config["run.num-rounds"]))

    def log(self, round, values):
        self.told.append((round, "accuracy" in values))
        if round == 1:
            raise OSError("the network is away")

    def finish(self):
        self.told.append(("finish",))


def test_a_sink_that_fails_is_dropped_and_the_run_goes_on(tiny_config, caplog: pytest.LogCaptureFixture):
    tiny_config |= {"run.num-rounds": 2, "train.local-steps": 1, "run.sinks": f"{__name__}:Mine"}
    Mine.told.clear()
    assert (simulate(tiny_config, 2) / "adapter").is_dir()
    assert Mine.told == [("start", "run", 2), (0, True), (1, True)]
    assert "the network is away" in caplog.text


def test_a_sink_hears_nothing_of_a_run_that_never_began(tiny_config, caplog: pytest.LogCaptureFixture):
    tiny_config |= {"run.num-rounds": 1, "train.local-steps": 1}
    simulate(tiny_config, 2)
    Mine.told.clear()
    with pytest.raises(ConfigError, match="holds a run already"):
        simulate(tiny_config | {"run.sinks": f"{__name__}:Mine"}, 2)
    assert Mine.told == []
    assert "gets no more" not in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wand", r"run\.sinks = 'wand': no such sink; use tensorboard, wandb"),
        ("wandb", r'run\.sinks = .wandb.: wandb is not installed; run `pip install "bora-fl\[tracking\]"`'),
        ("builtins:object", r"object has no start, log, finish"),
    ],
)
def test_what_is_no_sink_is_named(name: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=message):
        Sinks(name)
