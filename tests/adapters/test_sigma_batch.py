"""The Sigmas of all layers from one call: the values and gradients of a call for each."""

import pytest
import torch
from torch import nn

from bora_fl.adapters.layer import BoraAdapter
from bora_fl.adapters.sigma_batch import sigmas_at_once
from bora_fl.kernels.reference import exp_norm


def adapters() -> list[BoraAdapter]:
    torch.manual_seed(0)
    shapes = [(8, 12, 2, 2), (8, 12, 2, 2), (12, 8, 2, 2), (8, 8, 3, 4)]  # the last alone in its shape
    made = [BoraAdapter(n, m, r, b, 1.5) for n, m, r, b in shapes]
    made.append(BoraAdapter(8, 12, 2, 2, 1.0, "identity"))
    for adapter in made:
        nn.init.normal_(adapter.B)
    return [adapter.double() for adapter in made]


def outputs(given: list[BoraAdapter]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [a(torch.randn(5, a.A.shape[1], dtype=torch.float64, generator=g)) for a in given]


def gradients(given: list[BoraAdapter], found: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(sum(y.square().sum() for y in found), [p for a in given for p in a.parameters()]))


def test_values_and_gradients_are_those_of_a_call_for_each_layer():
    given = adapters()
    apart = outputs(given)
    wanted = gradients(given, apart)
    with sigmas_at_once(given):
        shared = [adapter.given_sigma is not None for adapter in given]
        together = outputs(given)
    found = gradients(given, together)
    assert shared == [True, True, True, False, False]
    torch.testing.assert_close(together, apart, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_nothing_is_left_behind_an_error():
    given = adapters()
    with pytest.raises(KeyError), sigmas_at_once(given):
        raise KeyError
    assert [adapter.given_sigma for adapter in given] == [None] * len(given)


def test_layers_have_means_of_their_own_and_a_layer_of_zeros_is_one():
    sigma = torch.randn(3, 2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma[1] = 0
    sigma.requires_grad_()
    found = exp_norm(sigma)
    for layer, Sigma in zip(sigma.detach(), found, strict=True):
        wanted = torch.exp(layer / layer.abs().mean()) if layer.any() else torch.ones_like(layer)
        torch.testing.assert_close(Sigma, wanted)
    assert torch.autograd.gradcheck(lambda s: exp_norm(s), sigma.detach()[[0, 2]].requires_grad_())
    (gradient,) = torch.autograd.grad(found.sum(), sigma)
    assert not gradient[1].any()
