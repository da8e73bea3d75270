"""The five functions, and Flower's own parts with ours."""

import ast
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import bora_fl
from bora_fl.client.app import app
from bora_fl.config import ConfigError, parse
from bora_fl.models import FederatedModel, load_base
from bora_fl.simulations.engine import InProcessGrid
from bora_fl.state import flatten
from bora_fl.strategies.base import FederatedStrategy
from bora_fl.wire.records import from_arrays, to_arrays

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


def test_the_functions_leave_out_what_libraries_say_whatever_a_run_does():
    program = (
        "import logging, warnings; warnings.simplefilter('error'); import bora_fl; bora_fl.simulate; "
        "warnings.warn('`is_gradient_checkpointing` is deprecated', FutureWarning); "
        "assert not logging.getLogger('bitsandbytes.backends').isEnabledFor(logging.WARNING)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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

    def done(comparison):
        return SimpleNamespace(results=(comparison.plan, str(comparison.baseline)))

    monkeypatch.setattr(run.Comparison, "run", done)
    chosen = {"model.name": tiny_config["model.name"], "adapter.rank": 2}
    names = ["refactor", "bora_fl.strategies.averaging:average"]
    plan, baseline = bora_fl.compare(names, chosen, scenarios=["dirichlet-1"], seeds=2, clients=3, output=tmp_path)
    assert [(one.settings.strategy.name, one.seed) for one in plan.runs] == [(n, s) for s in (0, 1) for n in names]
    assert {(one.num_clients, one.root, one.settings.adapter.rank) for one in plan.runs} == {(3, tmp_path, 2)}
    assert baseline == "bora/refactor"
    with pytest.raises(ConfigError, match=r"adapter\.rnk"):
        bora_fl.compare(names, {"adapter.rnk": 2})


@pytest.fixture
def apart(tiny_config):
    """A federation's grid over our ClientApp, settings, and the arrays to start from."""
    settings = parse(tiny_config | {"run.num-rounds": 2, "train.local-steps": 1})
    base = load_base(settings.model, ["bad", "good"], settings.run.seed)
    model = FederatedModel(base, settings.adapter, settings.model, settings.run.seed)
    return InProcessGrid(app, 3, settings.flat()), settings, to_arrays(flatten(model.read()))


def test_our_strategy_runs_in_a_server_app_of_ones_own(apart):
    grid, settings, arrays = apart
    server, results = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FederatedStrategy(settings)
        results.append(strategy.start(grid, arrays, num_rounds=2))

    server(grid, Context(1, 1, {}, RecordDict(), settings.flat()))
    assert sorted(results[0].train_metrics_clientapp) == [1, 2]
    before, after = from_arrays(arrays), from_arrays(results[0].arrays)
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_flower_s_own_strategy_is_told_why_it_cannot_use_our_client_app(apart, caplog: pytest.LogCaptureFixture):
    grid, _, arrays = apart
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        FedAvg(fraction_evaluate=0.0, min_available_nodes=3).start(grid, arrays, num_rounds=1)
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    (line, *_) = [record.getMessage() for record in caplog.records if "strategy-foreign" in record.getMessage()]
    assert "start FederatedStrategy in the ServerApp" in line
