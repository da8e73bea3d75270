"""The five functions, and Flower's own parts with ours."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import bora_fl
from bora_fl.config import ConfigError

TEXTS = ["the film is good and great", "a sad awful phone it was"]


def test_the_functions_are_these_and_importing_the_package_imports_no_library():
    code = (
        "import sys, bora_fl; names = [n for n in ('torch', 'pydantic', 'flwr') if n in sys.modules]; "
        "from bora_fl import compare, export, load, predict, simulate; print(names, bora_fl.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[] {bora_fl.__all__}"
    assert all(getattr(bora_fl, name).__doc__ for name in bora_fl.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = bora_fl.simulat
    stated = ast.parse(Path(bora_fl.__file__).read_text())
    typed = [a.name for node in ast.walk(stated) if isinstance(node, ast.ImportFrom) for a in node.names]
    assert [name for name in typed if name in bora_fl.__all__] == bora_fl.__all__[1:]


def test_simulate_predict_and_export(tiny_config, tmp_path: Path):
    folder = bora_fl.simulate(tiny_config | {"run.num-rounds": 1}, clients=2)
    predicted = bora_fl.predict(folder, TEXTS)
    assert [row["text"] for row in predicted] == TEXTS
    assert {row["label"] for row in predicted} <= {"0", "1"}
    with pytest.warns(UserWarning, match="tensors beside its factors"):
        assert bora_fl.export(folder, tmp_path / "lora", "lora", rank=4) == tmp_path / "lora"
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"rank = 4 with form = 'merged'"):
        bora_fl.export(folder, tmp_path / "merged", rank=4)
    with pytest.raises(ConfigError, match=r"clients = 0"):
        bora_fl.simulate(tiny_config, clients=0)


def test_compare_lays_out_what_it_is_told(tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bora_fl.simulations.compare import run

    def done(plan, baseline, **options):
        return SimpleNamespace(results=(plan, str(baseline)))

    monkeypatch.setattr(run, "run_comparison", done)
    chosen = {"model.name": tiny_config["model.name"], "adapter.rank": 2}
    names = ["refactor", "bora_fl.strategies.averaging:average"]
    plan, baseline = bora_fl.compare(names, chosen, scenarios=["dirichlet-1"], seeds=2, clients=3, output=tmp_path)
    assert [(one.settings.strategy.name, one.seed) for one in plan.runs] == [(n, s) for s in (0, 1) for n in names]
    assert {(one.num_clients, one.root, one.settings.adapter.rank) for one in plan.runs} == {(3, tmp_path, 2)}
    assert baseline == "bora/refactor"
    with pytest.raises(ConfigError, match=r"adapter\.rnk"):
        bora_fl.compare(names, {"adapter.rnk": 2})
