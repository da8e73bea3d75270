"""Real `flwr run` simulations: a SuperLink, Ray, the app's bundle."""

from pathlib import Path

import psutil
import pytest

from bora_fl.config import ConfigError
from bora_fl.launch import LaunchError, Simulation, run

ROOT = Path(__file__).resolve().parents[1]


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
