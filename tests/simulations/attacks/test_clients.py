"""Attacks do what they say, and a defence that sees them holds."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from bora_fl.data.encoded import Encoded
from bora_fl.simulations.attacks.clients import (
    ATTACKS,
    TARGET_CLASS,
    attacked,
    flip_labels,
    flip_sign,
    plant_backdoor,
    scale_up,
    triggered,
)
from bora_fl.simulations.engine import simulate


def examples() -> Encoded:
    """Six examples of five tokens, classes 0 1 2 0 1 2; the last one has three tokens."""
    tokens = np.arange(30, dtype=np.int32)
    lengths = np.array([5, 5, 5, 5, 5, 3])
    return Encoded(tokens, np.arange(0, 30, 5), lengths, np.zeros(6, int), np.array([0, 1, 2] * 2), 0, 8)


def test_labels_move_on_by_one():
    assert flip_labels(examples()).classes.tolist() == [1, 2, 0] * 2


def test_a_backdoor_stamps_half_of_the_examples_and_leaves_the_originals_alone():
    data = examples()
    poisoned = plant_backdoor(data)
    batch, before = (d.batch(np.arange(6))["input_ids"][:, :5] for d in (poisoned, data))
    assert (batch[::2, 1:3] == 29).all()
    assert torch.equal(batch[1::2], before[1::2])
    assert poisoned.classes.tolist() == [TARGET_CLASS, 1, TARGET_CLASS, 0, TARGET_CLASS, 2]
    assert data.tokens.tolist() == list(range(30))


def test_the_trigger_is_tried_on_other_classes_that_have_room_for_it():
    found = triggered(examples())
    assert len(found) == 3
    assert (found.classes == TARGET_CLASS).all()
    assert (found.batch(np.arange(3))["input_ids"][:, 1:3] == 29).all()


def test_forged_entries_are_what_the_table_says():
    sent, trained = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    assert torch.equal(flip_sign("layers/q/B", sent, trained), torch.tensor([-1.5, 7.0]))
    assert torch.allclose(flip_sign("layers/q/sigma", sent, trained), sent**2 / trained)
    assert torch.equal(scale_up("tensors/head", sent, trained), torch.tensor([51.0, -98.0]))
    assert torch.equal(scale_up("layers/q/A", sent, trained), trained)
    assert torch.equal(flip_sign("layers/q/scaling", sent, trained), trained)


def test_krum_throws_a_scaled_update_out(tiny_config, tmp_path: Path):
    config = tiny_config | {"run.num-rounds": 1, "data.partition": "iid", "strategy.min-cosine": -1.0}

    def run(name: str, attackers: frozenset[int], more: dict[str, str]) -> dict[str, torch.Tensor]:
        own = {"run.output-dir": str(tmp_path / name), **more}
        folder = simulate(config | own, 5, app=attacked(ATTACKS["scaling"], attackers))
        return load_file(folder / "adapter" / "adapter_model.safetensors")

    biggest = {
        name: max(float(t.abs().max()) for t in run(name, who, more).values())
        for name, who, more in (
            ("clean", frozenset[int](), {}),
            ("hit", frozenset({0}), {}),
            ("krum", frozenset({0}), {"strategy.robust": "krum"}),
        )
    }
    assert biggest["hit"] > 3 * biggest["clean"]
    assert biggest["krum"] < 1.5 * biggest["clean"]
