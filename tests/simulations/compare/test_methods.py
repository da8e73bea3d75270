import pytest

from bora_fl.config import parse
from bora_fl.data import load_dataset
from bora_fl.models import FederatedModel, load_base
from bora_fl.report import training_rows
from bora_fl.server.checkpoint import load_newest
from bora_fl.simulations.compare.plan import METHODS
from bora_fl.simulations.engine import simulate


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_method_federates(method: str, tiny_config):
    config = tiny_config | {"adapter.method": method, "run.num-rounds": 1, "train.local-steps": 2}
    settings = parse(config)
    base = load_base(settings.model, load_dataset(settings.data).label_names, 0)
    model = FederatedModel(base, settings.adapter, settings.model, 0)
    assert sorted(tuple(p.shape) for p in model.head_parameters()) == [(2,), (2, 16)]
    assert len(model.trained_parameters()) > 2
    start = model.read().tensors

    folder = simulate(config, 3)
    (row,) = training_rows(folder / "metrics.jsonl")
    assert (row["clients"], row["rejected"]) == (3, 0)
    assert row["bytes_up"] >= 3 * 4 * model.num_trained
    found = load_newest(folder / "checkpoints", settings.flat())
    assert found is not None
    merged = found.state.current.tensors
    assert merged.keys() == start.keys()
    assert all(bool((merged[name] != start[name]).any()) for name in merged if "classifier" in name)
