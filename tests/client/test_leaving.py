"""What a client keeps between rounds is one run's, and of no use to another."""

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from safetensors.torch import load_file

from bora_fl.client.app import app
from bora_fl.client.leaving import LOCAL, own
from bora_fl.client.lost import LOST
from bora_fl.client.moments import MOMENTS
from bora_fl.config import parse
from bora_fl.server.run import Server
from bora_fl.simulations.engine import InProcessGrid, simulate
from bora_fl.wire.records import KEPT, to_arrays


def test_what_another_run_has_left_is_forgotten_and_flower_s_own_records_are_not():
    memory = RecordDict({name: to_arrays({"x": torch.ones(1)}) for name in (LOCAL, LOST, MOMENTS, KEPT)})
    memory["secaggplus_state"] = ConfigRecord({"nid": 3})
    own(memory, "first")
    assert sorted(memory) == ["run", "secaggplus_state"]
    memory[LOCAL] = to_arrays({"x": torch.ones(1)})
    own(memory, "first")
    assert LOCAL in memory
    own(memory, "second")
    assert LOCAL not in memory


@pytest.mark.parametrize("change", [{"strategy.name": "fedsa"}, {"train.optimizer-state": "kept"}])
def test_a_second_run_of_a_series_is_as_one_alone(change: dict, tiny_config, tmp_path):
    """Flower gives it the memory of the first."""

    def config(name: str) -> dict:
        return tiny_config | change | {"run.output-dir": str(tmp_path / name), "run.num-rounds": 1}

    contexts = None
    for name in ("first", "second"):
        settings = parse(config(name))
        grid = InProcessGrid(app, 3, settings.flat())
        if contexts:
            for node, context in grid._contexts.items():
                context.state = contexts[node].state
        contexts = grid._contexts
        Server(settings).run(grid)
    alone = simulate(config("alone"), 3)
    found, wanted = (
        load_file(folder / "checkpoints" / "round-00001" / "state.safetensors")
        for folder in (tmp_path / "second", alone)
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
