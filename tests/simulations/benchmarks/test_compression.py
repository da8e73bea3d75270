import pytest

from bora_fl.adapters import lora_error
from bora_fl.exporting import load_run
from bora_fl.simulations.benchmarks import compression
from bora_fl.simulations.engine import simulate


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_whole_rank_loses_nothing_and_a_lower_one_what_the_export_says(tiny_config, tmp_path, capsys) -> None:
    sizes = {"adapter.rank": 2, "adapter.num-blocks": 4, "head.init": "random", "train.learning-rate": 0.05}
    folder = simulate(tiny_config | sizes | {"run.output-dir": str(tmp_path / "run")}, 2)
    rows = {name: (error, metrics) for name, error, metrics in compression.measured(folder, [1, 3, 8])}
    model, _ = load_run(folder)
    assert rows["rank 8"][0] == pytest.approx(0.0, abs=1e-6)
    assert rows["rank 8"][1].loss == pytest.approx(rows["as trained"][1].loss, abs=1e-6)
    for rank in (1, 3):
        assert rows[f"rank {rank}"][0] == pytest.approx(lora_error(model.model, rank), rel=1e-4)
        assert rows[f"rank {rank}"][0] > 0.05
    assert rows["rank 1"][1].loss != rows["as trained"][1].loss
    compression.main([str(folder), "--ranks", "1"])
    assert "rank 1" in capsys.readouterr().out
