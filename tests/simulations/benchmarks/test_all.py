import json
from pathlib import Path

from bora_fl.simulations.benchmarks.command import BENCHMARKS, run_all


def test_each_benchmark_is_the_command_and_a_failed_one_stops_no_other(tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "nonsense", ("", "there is none of this name in the command's own process"))
    assert run_all(["nonsense", "cost"], tmp_path) == 1
    failed, cost = json.loads((tmp_path / "bench.json").read_text())["benchmarks"]
    assert failed["exit_code"] != 0
    assert (cost["name"], cost["command"], cost["exit_code"]) == ("cost", "bora-fl bench cost", 0)
    assert "PEFT LoRA" in cost["output"]
    assert "failed: nonsense" in capfd.readouterr().out
