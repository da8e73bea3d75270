"""What a codec lost goes to the components it was lost on, wherever a merge has put them, or to none."""

from dataclasses import replace

import pytest
import torch
from flwr.app import RecordDict

from bora_fl.blocks.matching import matches
from bora_fl.client.lost import keep_lost, recall_lost
from bora_fl.simulations.engine import round_of, simulate
from bora_fl.strategies.rounds import Rounds
from bora_fl.wire.records import Instruction, from_arrays, to_arrays
from bora_fl.wire.schema import STATE

PARTS = frozenset({"A", "sigma", "B", "tensors"})
ROUND = Instruction(3, "run", PARTS, PARTS, evaluate=False)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"B": (6, 4), "sigma": (2, 2, 4), "A": (4, 8)}
    flat = {f"layers/q/{part}": torch.randn(shape, generator=g) for part, shape in shapes.items()}
    return flat | {"tensors/head": torch.randn(3, 5, generator=g)}


def kept(instruction: Instruction = ROUND) -> tuple[RecordDict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    memory, sent, lost = RecordDict(), state(0), state(1)
    keep_lost(memory, lost, sent, instruction)
    return memory, sent, lost


def take(flat: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
    return {n: t if n == "tensors/head" else t[order] if n.endswith("/A") else t[..., order] for n, t in flat.items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_losses_follow_components_that_were_sorted():
    memory, sent, lost = kept()
    later = replace(ROUND, round=4)
    assert same(recall_lost(memory, sent, later), lost)
    order = [2, 0, 3, 1]
    assert same(recall_lost(memory, take(sent, order), later), take(lost, order))


def test_components_that_were_turned_or_whose_sign_changed_start_anew():
    memory, sent, lost = kept()
    A = sent["layers/q/A"].clone()
    A[0], A[1] = -A[0], A[0] + A[1]
    found = recall_lost(memory, sent | {"layers/q/A": A}, replace(ROUND, round=4))
    for name, tensor in lost.items():
        wanted = tensor.clone()
        if name.endswith("/A"):
            wanted[:2] = 0
        elif name != "tensors/head":
            wanted[..., :2] = 0
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize("change", [{"round": 3}, {"round": 2}, {"round": 9, "feedback": 4}, {"feedback": 0}])
def test_a_round_that_is_taken_again_or_back_or_without_feedback_adds_nothing(change: dict):
    memory, sent, _ = kept()
    assert recall_lost(memory, sent, replace(ROUND, **({"round": 4} | change))) == {}
    assert recall_lost(RecordDict(), sent, replace(ROUND, round=4)) == {}


def test_another_rank_takes_what_it_has():
    memory, sent, lost = kept()
    found = recall_lost(memory, take(sent, [3, 1]), replace(ROUND, round=4))
    assert same(found, take(lost, [3, 1]))
    wider = sent | {"layers/q/A": torch.randn(4, 9)}
    assert recall_lost(memory, wider, replace(ROUND, round=4)).keys() == {"tensors/head"}


def test_each_row_is_matched_once():
    before = torch.eye(3)
    rows = torch.tensor([[1.0, 0.1, 0], [1.0, 0.0, 0], [0, 0, 1]])
    found = matches(rows, before)
    assert found is not None
    assert found.tolist() == [-1, 0, 2]


def test_what_was_lost_before_the_adapter_was_taken_back_is_not_sent(tiny_config, monkeypatch):
    asked, messages = set(), Rounds._messages

    def watched(self, nodes, kind, round, *rest):
        found = messages(self, nodes, kind, round, *rest)
        asked.update((round, Instruction.read(message.content).feedback) for message in found if kind == "train")
        return found

    def ruin(message, partition: int):
        if round_of(message) == 2:
            flat = from_arrays(message.content.array_records[STATE])
            big = {n: t * 1000 if "tensors" in n and t.is_floating_point() else t for n, t in flat.items()}
            message.content[STATE] = to_arrays(big)
        return message

    monkeypatch.setattr(Rounds, "_messages", watched)
    given = {"run.num-rounds": 4, "run.keep-best": True, "run.restart-margin": 0.5, "wire.codec": "int8"}
    simulate(tiny_config | given, 3, tamper=ruin)
    assert sorted(asked) == [(1, 1), (2, 1), (3, 1), (4, 4)]
