"""Sparse updates keep the largest changes and nothing else."""

import pytest
import torch

from bora_fl.blocks import BlockFactors
from bora_fl.state import AdapterState, flatten
from bora_fl.wire.sparsity import component_change, keep_components, sparsify


def states(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    received = AdapterState(
        {"q": BlockFactors(draw(8, 3), draw(2, 2, 3).exp(), draw(3, 10), 2.0)}, {"head": draw(4, 7), "bias": draw(1)}
    )
    f = received.layers["q"]
    trained = AdapterState(
        {"q": BlockFactors(f.B + draw(8, 3), f.sigma * draw(2, 2, 3).exp(), f.A + draw(3, 10), 2.0)},
        {name: t + draw(*t.shape) for name, t in received.tensors.items()},
    )
    return trained, received


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_changes_stay_and_all_else_is_as_received(fraction, dtype):
    trained, received = states(dtype)
    sparse, after, before = flatten(sparsify(trained, received, fraction)), flatten(trained), flatten(received)
    for name, tensor in sparse.items():
        if name.endswith("/scaling"):
            assert torch.equal(tensor, after[name])
            continue
        moved = tensor != before[name]
        assert int(moved.sum()) == min(int(-(-fraction * tensor.numel() // 1)), tensor.numel())
        assert torch.equal(tensor[moved], after[name][moved])
        change = (after[name] - before[name]).abs()
        if bool((~moved).any()):
            assert float(change[moved].min()) >= float(change[~moved].max())
        assert tensor.dtype == dtype


def test_everything_is_sent_at_one():
    trained, received = states()
    assert sparsify(trained, received, 1.0) is trained


def test_equal_changes_are_taken_in_order():
    received = AdapterState({}, {"w": torch.zeros(2, 3)})
    trained = AdapterState({}, {"w": torch.ones(2, 3)})
    assert sparsify(trained, received, 0.5).tensors["w"].tolist() == [[1, 1, 1], [0, 0, 0]]


def test_the_inputs_are_left_alone():
    trained, received = states()
    copies = [{k: t.clone() for k, t in flatten(s).items()} for s in (trained, received)]
    sparsify(trained, received, 0.3)
    for copy, now in zip(copies, (trained, received), strict=True):
        assert all(torch.equal(copy[k], t) for k, t in flatten(now).items())


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_a_fraction_out_of_range_is_refused(fraction):
    trained, received = states()
    with pytest.raises(ValueError, match="fraction"):
        sparsify(trained, received, fraction)


def test_states_of_different_shapes_are_refused():
    trained, received = states()
    with pytest.raises(ValueError, match="different tensors"):
        sparsify(AdapterState(trained.layers, {}), received, 0.5)


def two_layers():
    """A round in which B trained in one layer far more than in the other."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    received = AdapterState(
        {n: BlockFactors(draw(8, 3), draw(2, 2, 3), draw(3, 10), 2.0) for n in "ab"}, {"h": draw(2)}
    )
    layers = {
        n: BlockFactors(f.B + size * draw(8, 3), f.sigma, f.A, 2.0)
        for (n, f), size in zip(received.layers.items(), (0.1, 5.0), strict=True)
    }
    return AdapterState(layers, {"h": draw(2)}), received


def test_the_change_of_a_component_is_that_of_its_product():
    (trained, received), (_, other) = two_layers(), two_layers()
    f, old = trained.layers["a"], received.layers["b"]  # all three factors differ
    for new, before in ((f, old), (f, received.layers["a"]), (f, other.layers["a"])):
        for k, found in enumerate(component_change(new, before)):
            one, two = (BlockFactors(x.B[:, [k]], x.sigma[..., [k]], x.A[[k]], 2.0).dense() for x in (new, before))
            torch.testing.assert_close(found, (one - two).square().sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("fraction", "kept"), [(0.1, 1), (0.5, 3), (0.51, 4), (1.0, 6)])
def test_components_of_all_layers_compete(fraction, kept):
    trained, received = two_layers()
    sparse = keep_components(trained, received, fraction)
    moved = {
        n: [bool((f.B[:, k] != received.layers[n].B[:, k]).any()) for k in range(3)] for n, f in sparse.layers.items()
    }
    assert sum(moved["a"]) + sum(moved["b"]) == kept
    assert sum(moved["b"]) == min(kept, 3)  # where training moved most
    assert torch.equal(sparse.tensors["h"], trained.tensors["h"])
    for n, f in sparse.layers.items():
        for k in range(3):
            source = (trained if moved[n][k] else received).layers[n]
            assert torch.equal(f.B[:, k], source.B[:, k])
    left, cut = component_change(trained.layers["a"], received.layers["a"]), torch.tensor(moved["a"])
    assert cut.all() or not cut.any() or left[cut].min() >= left[~cut].max()


def test_components_need_the_same_tensors_and_a_share():
    trained, received = two_layers()
    with pytest.raises(ValueError, match="fraction = 0"):
        keep_components(trained, received, 0.0)
    with pytest.raises(ValueError, match="different tensors"):
        keep_components(trained, AdapterState(received.layers, {}), 0.5)
