"""Collected per-sample gradients equal a loop over samples, whatever is trained and however the layers are used."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bora_fl.client.per_sample import SampleGradients
from tests.client.toy_model import Toy, collate, losses, make_records

BATCH = collate(make_records(6))


def loop(model, batch):
    """Gradients of each sample alone, by autograd: the oracle."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for s in range(len(batch[1])):
        model.zero_grad()
        losses(model, tuple(part[s : s + 1] for part in batch)).sum().backward()
        rows.append([p.grad for p in trained])
    model.zero_grad()
    columns = zip(trained, zip(*rows, strict=True), strict=True)
    return {p: torch.stack(column) for p, column in columns if column[0] is not None}


def collect(model, batch, sample_losses=losses):
    with SampleGradients(model) as collector:
        sample_losses(model, batch).sum().backward()
        return collector.take(len(batch[1]))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-10, atol=1e-12)


def only(model, *endings):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(endings) and not name.startswith(("base", "embedding")))
    return model


@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
@pytest.mark.parametrize(
    "trained",
    [
        (".B",),
        (".sigma",),
        (".A",),
        (".A", ".B"),
        ("head.weight", "head.bias"),
        ("",),
        (".B", "norm.weight", "norm.bias"),
    ],
    ids=",".join,
)
def test_equals_a_loop_over_samples(trained, transform):
    model = only(Toy(transform).double(), *trained)
    assert_same(collect(model, BATCH), loop(model, BATCH))


def test_single_precision_agrees_to_1e_6():
    model = Toy()
    expected = loop(model.double(), BATCH)
    exact = [expected[p] for p in model.parameters() if p.requires_grad]
    found = collect(model.float(), BATCH)
    for gradient, reference in zip((found[p] for p in model.parameters() if p in found), exact, strict=True):
        assert (gradient.double() - reference).norm() < 1e-6 * reference.norm()


def test_no_batch_gradient_is_formed_and_the_model_is_as_before():
    model = Toy()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    collect(model, BATCH)
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_the_model_is_as_before_after_an_error():
    model = Toy()
    with pytest.raises(KeyError), SampleGradients(model):
        raise KeyError
    assert model.head.weight.requires_grad
    assert not any(m._forward_hooks for m in model.modules())


def test_a_layer_called_twice_adds_up():
    class Twice(Toy):
        def forward(self, tokens):
            h = self.second(self.second(self.embedding(tokens)))
            return self.head(h.mean(dim=1))

    model = only(Twice().double(), "second.A", "second.sigma", "second.B")
    assert_same(collect(model, BATCH), loop(model, BATCH))


def test_tied_weights_add_up():
    model = Toy().double()
    model.second.B = model.first.B = nn.Parameter(model.first.B.detach()[:, :2].clone())
    model.second.A = nn.Parameter(model.second.A[:2].detach())
    model.second.sigma = nn.Parameter(model.second.sigma[..., :2].detach())
    assert_same(collect(model, BATCH), loop(model, BATCH))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing(reentrant):
    class Checkpointed(Toy):
        def forward(self, tokens):
            h = torch.tanh(self.first(self.embedding(tokens)))
            h = h + checkpoint(self.second, h, use_reentrant=reentrant)
            return self.head(h.mean(dim=1))

    model = only(Checkpointed().double(), ".A", ".B", ".sigma")
    assert_same(collect(model, BATCH), loop(model, BATCH))


def test_an_output_changed_in_place_is_no_problem():
    class InPlace(Toy):
        def forward(self, tokens):
            h = self.first(self.embedding(tokens)).mul_(2).relu_()
            return self.head(h.mean(dim=1))

    model = only(InPlace().double(), "first.A", "first.B", "head.weight")
    assert_same(collect(model, BATCH), loop(model, BATCH))


def test_an_input_changed_in_place_is_refused():
    class Bad(Toy):
        def forward(self, tokens):
            h = self.embedding(tokens)
            y = self.first(h)
            h.zero_()
            return self.head(y.mean(dim=1))

    model = only(Bad(), "first.A")
    with pytest.raises(RuntimeError, match="'first' was changed in place"):
        collect(model, BATCH)


def test_a_layer_that_is_not_called_is_refused():
    class Bypass(Toy):
        def forward(self, tokens):
            return nn.functional.linear(self.embedding(tokens).mean(dim=1), self.head.weight)

    model = only(Bypass(), "head.weight", "second.A")
    model.embedding.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="did not go through its call"):
        collect(model, BATCH)


def test_an_input_shared_by_the_samples_is_refused():
    class Shared(Toy):
        def forward(self, tokens):
            return super().forward(tokens) + self.head(self.base.weight[:1])

    with pytest.raises(RuntimeError, match=r"'head' saw inputs of \[1, 6\] samples where the batch has 6"):
        collect(only(Shared(), "head.weight"), BATCH)


def test_a_layer_without_a_rule_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="'0' is a Scale, which has no rule"):
        SampleGradients(nn.Sequential(Scale()))


def test_batch_norm_in_training_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
        SampleGradients(model)
    model[1].requires_grad_(False)
    model.eval()
    SampleGradients(model)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        SampleGradients(Toy().requires_grad_(False))
