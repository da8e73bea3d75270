"""The benchmark's rows take the same step: what is compared in time must agree in result."""

import argparse

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from bora_fl.simulations.benchmarks import private_step as dp_bench

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

ARGUMENTS = argparse.Namespace(
    model="", targets="query,value", rank=2, blocks=2, batch=3, length=5, classes=3, repeats=1, threads=1
)
BATCH = torch.arange(15).view(3, 5), torch.tensor([0, 1, 2])


@pytest.fixture(autouse=True)
def tiny_base(monkeypatch):
    def load(settings, names, seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification(BertConfig(vocab_size=20000, num_labels=len(names), **sizes, **dropout))

    monkeypatch.setattr(dp_bench, "load_base", load)
    monkeypatch.setattr(dp_bench, "NOISE", 0.0)
    monkeypatch.setattr(dp_bench, "RATE", 1.0)


def moved(make_step):
    """Return how one step changes what is trained of a LoRA model."""
    model = dp_bench.lora_model(ARGUMENTS, 500)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    make_step(model)()
    return torch.cat([(after.detach() - start).flatten() for after, start in zip(trained, before, strict=True)])


@pytest.mark.parametrize("clip_norm", [1e6, 0.1])
def test_a_private_step_equals_opacus(monkeypatch, clip_norm):
    monkeypatch.setattr(dp_bench, "CLIP", clip_norm)
    ours = moved(lambda model: dp_bench.private_step(model, BATCH))
    hooks = moved(lambda model: dp_bench.opacus_step(model, BATCH, "hooks"))
    ghost = moved(lambda model: dp_bench.opacus_step(model, BATCH, "ghost"))
    # Opacus adds 1e-6 to every norm.
    for other in (hooks, ghost):
        assert (ours - other).norm() < 3e-5 * ours.norm()
    if clip_norm > 1:
        plain = moved(lambda model: dp_bench.plain_step(model, BATCH))
        assert (ours - plain).norm() < 1e-5 * plain.norm()
    else:
        assert ours.norm() <= clip_norm * (1 + 1e-5)


def test_lora_is_compared_at_the_nearest_number_of_trained_parameters():
    small, large = (dp_bench.count_trained(dp_bench.lora_model(ARGUMENTS, trained)) for trained in (500, 1000))
    a_rank = 2 * 2 * 32
    assert abs(small - 500) <= a_rank / 2
    assert abs(large - 1000) <= a_rank / 2


def test_every_row_is_measured_and_related_to_the_first():
    rows = dp_bench.measure(ARGUMENTS)
    text = dp_bench.table(rows).splitlines()
    assert len(rows) == 6
    assert all(seconds > 0 for _, _, seconds, _ in rows)
    assert text[1].split()[-2] == "1.00"
