"""Real `flwr run` simulations: a SuperLink, Ray, the app's bundle."""

from pathlib import Path

import psutil
import pytest

from bora_fl.config import ConfigError
from bora_fl.deployment.launch import LaunchError, Simulation, _reason, run

ROOT = Path(__file__).resolve().parents[2]


def test_a_simulation_runs_to_its_end_and_leaves_no_process_behind(tiny_config):
    lines: list[str] = []
    outcome = run(ROOT, tiny_config | {"run.num-rounds": 2}, simulation=Simulation(3), show=lines.append)
    assert [row["round"] for row in outcome.rows] == [1, 2]
    assert [row["clients"] for row in outcome.rows] == [3, 3]
    assert any(line.startswith("round 2/2") for line in lines)
    assert (outcome.folder / "adapter" / "adapter_model.safetensors").is_file()
    left = [p.name() for p in psutil.Process().children(recursive=True) if p.name() != "python"]
    assert not [name for name in left if "raylet" in name or "superlink" in name or "gcs" in name]


def test_a_run_that_fails_says_so(tiny_config):
    # the config is sound, but the layer the adapter should go to does not exist
    with pytest.raises(LaunchError, match=r"adapter\.target-modules"):
        run(ROOT, tiny_config | {"adapter.target-modules": "nowhere"}, simulation=Simulation(2), show=lambda line: None)


def test_a_wrong_setting_stops_before_anything_starts(tiny_config):
    with pytest.raises(ConfigError, match="did you mean"):
        run(ROOT, tiny_config | {"run.num-round": 2}, simulation=Simulation(2))


LOG = """INFO :      Starting
bora-fl | round 1/3: train loss 1.0
ERROR :     ServerApp raised an exception
Traceback (most recent call last):
  File "run.py", line 1, in run
bora_fl.strategies.observer.RunFailedError: 1 of 3 nodes are connected after 600 s; start more SuperNodes
or lower strategy.min-nodes
INFO :      Finished
"""


def test_the_reason_of_a_failure_is_what_the_log_names(tmp_path: Path):
    log = tmp_path / "run.log"
    log.write_text(LOG)
    first, second = _reason(log).splitlines()
    assert first.startswith("bora_fl.strategies.observer.RunFailedError: 1 of 3 nodes")
    assert second == "or lower strategy.min-nodes"


def test_a_run_that_was_killed_is_said_to_be_resumable(tmp_path: Path):
    (tmp_path / "run.log").write_text("\n".join(LOG.splitlines()[:2]))
    assert "run.resume=true" in _reason(tmp_path / "run.log")
