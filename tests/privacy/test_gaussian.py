"""The Gaussian mechanism: bounded contributions, the right noise, and where it comes from."""

import math

import pytest
import torch
from scipy import stats

from bora_fl.privacy.gaussian import (
    SeededRandomness,
    SystemRandomness,
    add_noise,
    clip,
    from_coordinates,
    joint_norm,
    poisson_sample,
    privatize,
    to_coordinates,
)


def update(scale=1.0):
    return {"a": scale * torch.tensor([3.0, 0.0]), "b": scale * torch.tensor([[0.0, 4.0]])}


def test_clipping_is_joint_over_all_tensors():
    clipped, norm = clip(update(), 1.0)
    assert norm == 5.0
    torch.testing.assert_close(clipped["a"], torch.tensor([0.6, 0.0], dtype=torch.float64))
    torch.testing.assert_close(clipped["b"], torch.tensor([[0.0, 0.8]], dtype=torch.float64))


def test_a_small_update_is_left_as_it_is():
    clipped, _ = clip(update(), 5.0)
    assert all(torch.equal(clipped[name], tensor) for name, tensor in update().items())
    assert clip({"a": torch.zeros(2)}, 1.0)[1] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_counts_as_zero(bad):
    clipped, _ = clip({**update(), "c": torch.tensor([bad])}, 1.0)
    assert joint_norm(clipped) == 0.0


@pytest.mark.parametrize("randomness", [SystemRandomness(), SeededRandomness(3)])
def test_both_sources_are_standard_normal_and_uniform(randomness):
    normal = randomness.normal(40_001)
    assert normal.shape == (40_001,)
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-4
    # The transform makes values in pairs: they must not be correlated.
    assert abs(torch.corrcoef(torch.stack([normal[:20_000], normal[20_001:]]))[0, 1]) < 0.04
    uniform = randomness.uniform(40_000)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-4


def test_extreme_bits_give_finite_noise(monkeypatch):
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("os.urandom", lambda count, byte=byte: byte * count)
        assert SystemRandomness().normal(4).isfinite().all()
        assert 0 <= SystemRandomness().uniform(1).item() < 1


def test_a_seeded_torch_generator_has_only_32_bits_of_seed():
    """Why a seed from the operating system would not do: 2^32 noise streams can all be tried."""
    low, high = (torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (1, 1 + 2**32))
    assert torch.equal(low, high)


def test_system_randomness_never_repeats():
    torch.manual_seed(0)
    first = SystemRandomness().normal(4)
    torch.manual_seed(0)
    assert not torch.equal(first, SystemRandomness().normal(4))


def test_noise_is_scaled_by_the_clip_norm():
    noised = privatize({"a": torch.zeros(50_000)}, clip_norm=0.5, noise_multiplier=4.0, randomness=SeededRandomness(0))
    assert noised["a"].std() == pytest.approx(2.0, rel=0.02)


def test_a_noised_update_without_noise_is_the_clipped_one():
    noised = privatize(update(), clip_norm=1.0, noise_multiplier=0.0)
    assert joint_norm(noised) == pytest.approx(1.0)


def test_noise_keeps_dtype_and_shape():
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    noised = add_noise(tensor, 1.0, SeededRandomness(0))
    assert (noised.dtype, noised.shape) == (tensor.dtype, tensor.shape)
    assert not tensor.any()


def test_poisson_sampling_draws_independently():
    randomness = SeededRandomness(0)
    draws = [poisson_sample(50, 0.3, randomness) for _ in range(400)]
    sizes = torch.tensor([len(draw) for draw in draws], dtype=torch.float64)
    assert sizes.mean() == pytest.approx(15, abs=0.8)
    assert sizes.var() == pytest.approx(10.5, rel=0.3)
    assert poisson_sample(50, 0.0, randomness) == []
    assert poisson_sample(50, 1.0, randomness) == list(range(50))


@pytest.mark.parametrize(("clip_norm", "noise", "message"), [(0.0, 1.0, "clip_norm"), (1.0, -1.0, "noise_multiplier")])
def test_bad_settings_are_named(clip_norm, noise, message):
    with pytest.raises(ValueError, match=message):
        privatize(update(), clip_norm, noise)


def test_sigma_moves_in_logarithms_under_exp_norm_alone():
    start = {"layers/q/sigma": torch.tensor([[[0.5, 2.0]]]), "layers/q/B": torch.ones(2, 2)}
    for transform in ("exp_norm", "identity"):
        back = from_coordinates(to_coordinates(start, transform), transform)
        for name, tensor in start.items():
            torch.testing.assert_close(back[name], tensor)
    shifted = {name: tensor - 10.0 for name, tensor in to_coordinates(start, "exp_norm").items()}
    assert (from_coordinates(shifted, "exp_norm")["layers/q/sigma"] > 0).all()
    crossed = {"layers/q/sigma": torch.tensor([[[-0.5, 2.0]]])}
    assert torch.equal(to_coordinates(crossed, "identity")["layers/q/sigma"], crossed["layers/q/sigma"])
