"""What a node holds is not sent again, and no run ends in another adapter for it."""

import pytest
import torch
from safetensors.torch import load_file

from bora_fl.blocks import BlockFactors
from bora_fl.client.app import app
from bora_fl.config import parse
from bora_fl.report import training_rows
from bora_fl.server.run import Server
from bora_fl.simulations.engine import InProcessGrid, round_of, simulate
from bora_fl.state import flatten_deltas, unflatten_deltas
from bora_fl.strategies.downlink import Downlink
from bora_fl.wire.records import from_arrays, to_arrays
from bora_fl.wire.refusals import Code, Refusal
from bora_fl.wire.schema import refusal

STEPS = {"train.local-steps": 1, "strategy.evaluate-in-train": False, "head.init": "random", "run.num-rounds": 2}


def adapter_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_leaving_out_what_did_not_change_changes_no_adapter(tiny_config, tmp_path, monkeypatch):
    config = tiny_config | STEPS | {"strategy.name": "cellm", "strategy.upload-fraction": 0.05}
    less = simulate(config | {"run.output-dir": str(tmp_path / "less")}, 2)
    monkeypatch.setattr(Downlink, "expect", lambda self, *rest: None)
    whole = simulate(config | {"run.output-dir": str(tmp_path / "whole")}, 2)
    found, wanted = adapter_of(less), adapter_of(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    few, many = (training_rows(folder / "metrics.jsonl") for folder in (less, whole))
    assert [row["rejected"] for row in few] == [0, 0]
    assert few[0]["bytes_down"] == many[0]["bytes_down"]
    assert few[1]["bytes_down"] < 0.9 * many[1]["bytes_down"]


def test_a_client_that_lost_its_memory_says_so_and_is_sent_everything(tiny_config):
    settings = parse(tiny_config | STEPS | {"strategy.name": "ffa", "run.num-rounds": 4})

    class Forgetful(InProcessGrid):
        def _handle(self, message):
            instruction = message.content.config_records.get("instruction", {})
            if instruction.get("round") == 2 and message.metadata.dst_node_id == 3:
                self._contexts[3].state.clear()
            return super()._handle(message)

    folder = Server(settings).run(Forgetful(app, 3, settings.flat()))
    rows = training_rows(folder / "metrics.jsonl")
    assert [row["rejected"] for row in rows] == [0, 1, 0, 0]
    assert rows[2]["bytes_down"] > rows[3]["bytes_down"]


def flat(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"layers/q/A": torch.ones(30), "layers/q/B": torch.randn(30, generator=g)}


def sent(downlink: Downlink, state, nodes=(1, 2, 3), folds=()):
    return {parcel.node: parcel for parcel in downlink.parcels(nodes, state, to_arrays(state), folds)}


def test_only_a_node_whose_reply_was_accepted_is_sent_less():
    downlink = Downlink()
    assert all(not parcel.base for parcel in sent(downlink, flat()).values())
    downlink.expect([1, 2], flat(), {"A"})
    downlink.settle({1}, {})
    parcels = sent(downlink, flat(1))
    assert list(from_arrays(parcels[1].records["state"])) == ["layers/q/B"]
    assert parcels[1].base
    assert not parcels[2].base
    assert not parcels[3].base
    downlink.expect([1], flat(1), {"A"})
    downlink.settle(set(), {})
    assert not sent(downlink, flat(2))[1].base


def test_base_deltas_are_serialized_once_and_shared(monkeypatch):
    count = []
    monkeypatch.setattr("bora_fl.strategies.downlink.to_arrays", lambda flat: count.append(flat) or to_arrays(flat))
    downlink, folds = Downlink(), [{"q/dense": torch.ones(2, 2)}, {"q/dense": torch.zeros(2, 2)}]
    downlink.settle(set(), {2: 1})
    parcels = sent(downlink, flat(), folds=folds)
    assert parcels[1].records["folds-2"] is parcels[2].records["folds-2"]
    assert parcels[1].records["folds-1"] is parcels[3].records["folds-1"]
    assert "folds-1" not in parcels[2].records
    assert len(count) == 2
    sent(downlink, flat(), folds=folds)
    assert len(count) == 2


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_smaller_of_stack_and_dense_delta_is_sent(rank: int):
    g = torch.Generator().manual_seed(rank)
    factors = BlockFactors(*(torch.randn(shape, generator=g) for shape in ((6, rank), (2, 2, rank), (rank, 4))), 0.5)
    flat = flatten_deltas({"q": factors})
    assert ("q/dense" in flat) == (rank * (6 + 4 + 4) > 6 * 4)
    found = unflatten_deltas({f"7/{name}": tensor for name, tensor in flat.items()}, "7/")["q"]
    dense = found.dense() if isinstance(found, BlockFactors) else found
    torch.testing.assert_close(dense, factors.to(torch.float64).dense().float())


def test_a_site_that_claims_to_hold_fewer_base_deltas_than_none_does_not_end_the_run(tiny_config):
    """The server would count up from there."""

    def lie(reply, partition: int):
        if partition == 1 and round_of(reply) == 2:
            reply.content = refusal(Refusal(Code.FOLDS_MISSING, folds_held=-(2**62)))
        return reply

    folder = simulate(tiny_config | STEPS | {"strategy.name": "fedex", "run.num-rounds": 3}, 3, tamper=lie)
    assert [row["rejected"] for row in training_rows(folder / "metrics.jsonl")] == [0, 1, 0]
