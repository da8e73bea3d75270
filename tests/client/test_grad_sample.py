"""Per-sample gradients of an adapter: Opacus' own checker, a loop over samples, and autograd in float64."""

import itertools
import unittest

import pytest
import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.tests.grad_samples.common import GradSampleHooks_test
from peft import get_peft_model
from torch import nn

from bora_fl.adapters import BoraConfig
from bora_fl.adapters.layer import BoraAdapter
from bora_fl.adapters.ravan import RavanCores
from bora_fl.client.grad_sample import adapter_sample_gradients
from bora_fl.simulations.benchmarks import private_step as dp_bench

# Opacus' hooks warn when a layer's input needs no gradient, as a first layer's does.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

ALL = frozenset({"A", "sigma", "B"})


def make_adapter(num_blocks=4, transform="exp_norm", rank=3, n=16, m=24, dtype=torch.float32, **kwargs):
    torch.manual_seed(num_blocks)
    adapter = BoraAdapter(n, m, rank, num_blocks, 1.7, transform, **kwargs).to(dtype)
    adapter.reset_parameters(init_weights=False)
    return adapter


class AdapterGradSamplerTest(GradSampleHooks_test):
    """Opacus' checker, hooks and functorch, mean and sum."""

    def test_matches_micro_batches(self):
        torch.manual_seed(0)
        for b, transform, samples in itertools.product((1, 2, 4, 8), ("exp_norm", "identity"), (0, 1, 4)):
            for shape in ((samples, 16), (samples, 5, 16)):
                with self.subTest(b=b, transform=transform, shape=shape):
                    self.run_test(torch.randn(shape), make_adapter(b, transform), ew_compatible=False)


# The base class has no tests of its own, and would be collected as a second, empty test case.
del GradSampleHooks_test


def loop_over_samples(adapter, x, dy):
    names = [name for name, _ in adapter.named_parameters()]
    rows = [
        torch.autograd.grad((adapter(x[s : s + 1]) * dy[s : s + 1]).sum(), adapter.parameters()) for s in range(len(x))
    ]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 2, 3)])
@pytest.mark.parametrize("transform", ["exp_norm", "identity"])
@pytest.mark.parametrize("num_blocks", [1, 2, 4, 8])
def test_matches_a_loop_over_samples(num_blocks, transform, shape):
    adapter = make_adapter(num_blocks, transform, dtype=torch.float64)
    x, dy = torch.randn(*shape, 16, dtype=torch.float64), torch.randn(*shape, 24, dtype=torch.float64)
    expected = loop_over_samples(adapter, x, dy)
    found = adapter_sample_gradients(adapter, x, dy, ALL)
    for name in ALL:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_matches_a_loop_in_single_precision_to_1e_6():
    adapter = make_adapter(8, "exp_norm", rank=8, n=384, m=384)
    x, dy = torch.randn(6, 64, 384), torch.randn(6, 64, 384) / 64
    expected = loop_over_samples(adapter.double(), x.double(), dy.double())
    found = adapter_sample_gradients(adapter.float(), x, dy, ALL)
    for name in ALL:
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-6, (name, error)


@pytest.mark.parametrize("wanted", [set(c) for k in range(4) for c in itertools.combinations(sorted(ALL), k)])
def test_computes_what_is_wanted_and_nothing_else(wanted):
    adapter = make_adapter()
    x, dy = torch.randn(3, 2, 16), torch.randn(3, 2, 24)
    everything = adapter_sample_gradients(adapter, x, dy, ALL)
    found = adapter_sample_gradients(adapter, x, dy, frozenset(wanted))
    assert found.keys() == wanted
    for name in wanted:
        assert torch.equal(found[name], everything[name])


def test_gradient_of_sigma_is_orthogonal_to_sigma_for_every_sample():
    adapter = make_adapter(dtype=torch.float64)
    x, dy = torch.randn(3, 2, 16, dtype=torch.float64), torch.randn(3, 2, 24, dtype=torch.float64)
    gradient = adapter_sample_gradients(adapter, x, dy, ALL)["sigma"]
    inner = (gradient * adapter.sigma).sum(dim=(1, 2, 3))
    assert inner.abs().max() < 1e-12 * gradient.norm()


def test_importing_the_client_registers_both_samplers():
    assert BoraAdapter in GradSampleHooks.GRAD_SAMPLERS
    assert BoraAdapter in GradSampleHooksFastGradientClipping.GRAD_SAMPLERS
    assert BoraAdapter in GradSampleHooksFastGradientClipping.NORM_SAMPLERS


def test_norm_sampler_gives_the_norms_of_the_gradients():
    adapter = make_adapter()
    x, dy = torch.randn(3, 2, 16), torch.randn(3, 2, 24)
    gradients = adapter_sample_gradients(adapter, x, dy, ALL)
    norms = GradSampleHooksFastGradientClipping.NORM_SAMPLERS[BoraAdapter](adapter, [x], dy)
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(norms[parameter], torch.stack([g.norm() for g in gradients[name]]))


def test_a_batch_size_read_off_a_base_weight_is_refused():
    """Opacus takes the last positional input for the batch: with a bias there it would scale a mean loss wrongly."""
    adapter = make_adapter()
    hooks = GradSampleHooks(adapter)
    y = adapter(torch.randn(3, 16), torch.randn(24, 16), torch.randn(24))
    with pytest.raises(ValueError, match="24 samples where it holds 3"):
        y.mean().backward()
    hooks.cleanup()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_opacus_on_a_peft_model_takes_our_step(monkeypatch, mode):
    """A base layer that would be fused, and a batch of another size than its bias: one step, three ways."""
    monkeypatch.setattr(dp_bench, "NOISE", 0.0)
    monkeypatch.setattr(
        dp_bench, "sample_losses", lambda model, batch: model(batch[0]).square().sum(dim=-1).mean(dim=-1)
    )
    batch = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1)), torch.zeros(5)
    moved = []
    for make in (dp_bench.private_step, lambda model, batch: dp_bench.opacus_step(model, batch, mode)):
        torch.manual_seed(0)
        config = BoraConfig(r=2, num_blocks=2, target_modules=["0", "2"], init_weights=False)
        model = get_peft_model(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 6)), config)
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        make(model, batch)()
        after = [p.detach() for p in model.parameters() if p.requires_grad]
        moved.append(torch.cat([(a - b).flatten() for a, b in zip(after, start, strict=True)]))
    ours, theirs = moved
    assert (ours - theirs).norm() < 1e-3 * ours.norm()


def test_dropout_is_refused():
    adapter = make_adapter(dropout_p=0.1)
    with pytest.raises(ValueError, match=r"bora_dropout=0\.1"):
        adapter_sample_gradients(adapter, torch.randn(3, 16), torch.randn(3, 24), ALL)


@pytest.mark.parametrize("shape", [(5,), (5, 7), (0, 7)])
@pytest.mark.parametrize("structure", ["heads", "blocks"])
def test_cores_match_a_loop_over_samples(structure, shape):
    torch.manual_seed(0)
    cores = RavanCores(3, 4, structure).double()
    for parameter in cores.parameters():
        nn.init.normal_(parameter)
    u, dz = (torch.randn(*shape, 4, 3, dtype=torch.float64) for _ in range(2))
    found = GradSampleHooks.GRAD_SAMPLERS[RavanCores](cores, [u], dz)
    assert {len(gradient) for gradient in found.values()} == {shape[0]}
    if shape[0]:
        for name, expected in loop_over_samples(cores, u, dz).items():
            torch.testing.assert_close(found[getattr(cores, name)], expected, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    unittest.main()
