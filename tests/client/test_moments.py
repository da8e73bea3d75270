"""Adam's moments from one round to the next: going on is training without a break, unless the coordinates moved."""

from dataclasses import replace

import pytest
import torch
from flwr.app import RecordDict

from bora_fl.client.moments import kept, restore
from bora_fl.client.site import Site
from bora_fl.client.training import make_optimizer
from bora_fl.config import ConfigError, parse
from bora_fl.simulations.engine import simulate
from bora_fl.state import AdapterState, flatten

ALL = frozenset({"A", "sigma", "B", "tensors"})


@pytest.fixture
def site(tiny_config) -> Site:
    return Site(parse(tiny_config | {"adapter.sigma-transform": "identity"}))


def steps(site: Site, model, optimizer, count: int) -> None:
    data = site.data(0, 3).train
    batch = data.batch(range(16))
    model.model.eval()
    for _ in range(count):
        optimizer.zero_grad()
        model.model(**batch).loss.backward()
        optimizer.step()


def prepared(site: Site, state: AdapterState | None = None):
    model = site.model()
    start = site.__dict__.setdefault("start", model.read())
    model.write(state or start)
    model.train_only(ALL)
    return model, make_optimizer(model, site.settings.train)


def test_two_rounds_are_one_without_a_break(site: Site):
    model, optimizer = prepared(site)
    steps(site, model, optimizer, 6)
    wanted = flatten(model.read())

    model, optimizer = prepared(site)
    memory = RecordDict()
    with kept(memory, model.read(), model, optimizer) as restored:
        assert restored == 0
        steps(site, model, optimizer, 3)
    model, optimizer = prepared(site, model.read())
    with kept(memory, model.read(), model, optimizer) as restored:
        assert restored == len(model.trained_parameters())
        steps(site, model, optimizer, 3)
    found = flatten(model.read())
    assert max(float((found[n] - wanted[n]).abs().max()) for n in wanted) < 1e-6

    model, fresh = prepared(site)
    steps(site, model, fresh, 3)
    model, fresh = prepared(site, model.read())
    steps(site, model, fresh, 3)
    broken = flatten(model.read())
    assert max(float((broken[n] - wanted[n]).abs().max()) for n in wanted) > 1e-3


def test_exp_norms_moments_go_with_the_norm_that_sigma_is_written_with(tiny_config):
    """The next gradient of the rescaled sigma is the next gradient of the old one, over the ratio of their norms."""
    site = Site(parse(tiny_config))
    model, optimizer = prepared(site)
    memory = RecordDict()
    with kept(memory, model.read(), model, optimizer):
        steps(site, model, optimizer, 2)
    name = next(n for n in model.named_trained() if n.endswith("/sigma"))
    left, state = model.named_trained()[name], optimizer.state
    norm, (first, second) = left.detach().norm(), (state[left][kind].clone() for kind in ("exp_avg", "exp_avg_sq"))
    steps(site, model, torch.optim.SGD(model.trained_parameters(), lr=0.0), 1)
    gradient = left.grad.clone()
    model, optimizer = prepared(site, model.read())
    restore(memory, model.read(), model, optimizer)
    steps(site, model, torch.optim.SGD(model.trained_parameters(), lr=0.0), 1)
    now = model.named_trained()[name]
    ratio = norm / now.detach().norm()
    assert abs(float(ratio) - 1) > 1e-3
    torch.testing.assert_close(now.grad, gradient * ratio, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(optimizer.state[now]["exp_avg"], first * ratio)
    torch.testing.assert_close(optimizer.state[now]["exp_avg_sq"], second * ratio**2)


@pytest.mark.parametrize("turn", ["swapped", "flipped"])
def test_a_layer_whose_components_were_turned_starts_anew(site: Site, turn: str):
    model, optimizer = prepared(site)
    memory = RecordDict()
    with kept(memory, model.read(), model, optimizer):
        steps(site, model, optimizer, 2)
    state = model.read()
    layer = next(iter(state.layers))
    factors = state.layers[layer]
    A, B, sigma = factors.A, factors.B, factors.sigma
    moved = {
        "swapped": replace(factors, A=A.flip(0), B=B.flip(1), sigma=sigma.flip(2)),
        "flipped": replace(factors, A=-A, B=-B),
    }[turn]
    assert torch.allclose(moved.dense(), factors.dense(), atol=1e-6)  # the same update in other coordinates
    model, optimizer = prepared(site, AdapterState({**state.layers, layer: moved}, state.tensors))
    restored = restore(memory, model.read(), model, optimizer)
    assert restored == len(model.trained_parameters()) - 3
    assert not any(model.named_trained()[f"layers/{layer}/{part}"] in optimizer.state for part in ("A", "sigma", "B"))


def test_a_federation_keeps_them(tiny_config):
    adapters = []
    for state in ("fresh", "kept"):
        folder = f"{tiny_config['run.output-dir']}-{state}"
        given = {"run.num-rounds": 2, "train.optimizer-state": state, "run.output-dir": folder}
        found = simulate(tiny_config | given, 3)
        adapters.append((found / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1]


def test_sgd_has_no_such_moments(tiny_config):
    with pytest.raises(ConfigError, match=r"train\.optimizer-state = 'kept' with train\.optimizer = 'sgd'"):
        parse(tiny_config | {"train.optimizer-state": "kept", "train.optimizer": "sgd"})
