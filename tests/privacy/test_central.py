"""Client-level privacy: one client's reach, the noise on the merge's inputs, adaptive clipping, checked assumptions."""

import math

import pytest
import torch

from bora_fl.blocks import BlockFactors, refactorize
from bora_fl.privacy.accounting import Budget, BudgetExceeded, Spent, epsilon
from bora_fl.privacy.central import (
    AdaptiveClip,
    ClientAccount,
    PrivacyState,
    adaptive_noised_mean,
    noised_each,
    noised_mean,
)
from bora_fl.privacy.gaussian import SeededRandomness, joint_norm

SHAPES = {"layers/q/B": torch.zeros(4, 2), "tensors/head": torch.zeros(3)}


def make_updates(count, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [
        {name: scale * torch.randn(t.shape, generator=generator) for name, t in SHAPES.items()} for _ in range(count)
    ]


def flat(update):
    return torch.cat([tensor.flatten() for tensor in update.values()])


def test_no_noise_and_no_clip_is_the_mean():
    updates = make_updates(5)
    found = noised_mean(updates, SHAPES, 1e9, 0.0, expected_clients=5)
    torch.testing.assert_close(flat(found), torch.stack([flat(u) for u in updates]).mean(dim=0))


def test_one_client_moves_the_mean_by_at_most_the_clip_norm_over_the_expected_clients():
    updates = make_updates(5, scale=100.0)
    settings = {"clip_norm": 0.5, "noise_multiplier": 0.0, "expected_clients": 4}
    difference = flat(noised_mean(updates, SHAPES, **settings)) - flat(noised_mean(updates[:-1], SHAPES, **settings))
    assert difference.norm() == pytest.approx(0.5 / 4, rel=1e-5)


def test_the_divisor_does_not_tell_who_answered():
    updates = make_updates(3)
    one = flat(noised_mean(updates[:1], SHAPES, 1e9, 0.0, expected_clients=3))
    torch.testing.assert_close(one, flat(updates[0]) / 3)


def test_a_round_without_clients_is_noise_of_the_accounted_size():
    shapes = {"w": torch.zeros(40_000)}
    noise = noised_mean(
        [], shapes, clip_norm=2.0, noise_multiplier=3.0, expected_clients=4, randomness=SeededRandomness(0)
    )
    assert noise["w"].std() == pytest.approx(2.0 * 3.0 / 4, rel=0.02)
    assert noise["w"].dtype == torch.float32


def test_noising_each_update_costs_the_square_root_of_the_clients():
    updates = [{"w": torch.zeros(20_000)} for _ in range(9)]
    each = noised_each(updates, 1.0, 1.0, SeededRandomness(0))
    mean = sum(update["w"] for update in each) / 9
    shared = noised_mean(updates, {"w": torch.zeros(20_000)}, 1.0, 1.0, 9, SeededRandomness(0))["w"]
    assert mean.std() / shared.std() == pytest.approx(3.0, rel=0.03)


def test_what_follows_the_noise_sees_the_noised_inputs_only():
    """Two rounds with equal noised factors refactorize equally, whatever the clients had sent: post-processing."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(shape, generator=generator) for shape in ((8, 3), (2, 2, 3), (3, 8))]
    noised = [noised_mean([{"w": f}], {"w": f}, 1.0, 1.0, 1, SeededRandomness(k))["w"] for k, f in enumerate(factors)]
    B, sigma, A = noised
    first, second = (refactorize(BlockFactors(B, sigma, A, 1.0), 2).factors for _ in range(2))
    torch.testing.assert_close(first.dense(), second.dense())


def test_an_update_of_other_shape_is_refused():
    with pytest.raises(ValueError, match="'tensors/head' has shape None"):
        noised_mean([{"layers/q/B": torch.zeros(4, 2)}], SHAPES, 1.0, 0.0, 1)


# Adaptive clipping


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_the_clip_norm_reaches_the_quantile(quantile):
    updates = make_updates(101)
    clipping = AdaptiveClip(clip_norm=0.01, count_noise=0.5, quantile=quantile)
    randomness = SeededRandomness(0)
    for _ in range(150):
        _, clipping = adaptive_noised_mean(updates, SHAPES, clipping, 0.9, len(updates), randomness)
    norms = torch.tensor([joint_norm(update) for update in updates])
    within = (norms <= clipping.clip_norm).float().mean()
    assert within == pytest.approx(quantile, abs=0.05)


def test_updates_and_count_together_spend_the_noise_multiplier():
    """Two Gaussian releases of sensitivities 1 and ½ compose to one: 1/z² = 1/z_Δ² + (½/σ_b)²."""
    clipping = AdaptiveClip(clip_norm=1.0, count_noise=2.0)
    update_noise = clipping.update_noise(1.1)
    assert update_noise > 1.1
    assert pytest.approx(update_noise**-2 + (0.5 / 2.0) ** 2) == 1.1**-2
    composed = epsilon([(update_noise, 1.0, 7), (2 * 2.0, 1.0, 7)], 1e-5, "rdp")
    assert composed == pytest.approx(epsilon([(1.1, 1.0, 7)], 1e-5, "rdp"), rel=1e-6)


def test_a_count_that_would_spend_everything_is_refused():
    with pytest.raises(ValueError, match=r"use a count_noise above 0\.5"):
        AdaptiveClip(clip_norm=1.0, count_noise=0.4).update_noise(1.0)
    with pytest.raises(ValueError, match="count_noise"):
        AdaptiveClip(clip_norm=1.0, count_noise=0.0).update_noise(1.0)


@pytest.mark.parametrize("settings", [{"clip_norm": math.inf}, {"quantile": 1.0}, {"rate": 0.0}, {"count_noise": -1.0}])
def test_adaptive_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdaptiveClip(**({"clip_norm": 1.0, "count_noise": 1.0} | settings))


# The account


def rounds(account, count, **changes):
    settings = {"noise_multiplier": 1.0, "sampling": "poisson", "sample_rate": 0.1, "weights": [1.0, 1.0]} | changes
    for _ in range(count):
        account = account.after_round(**settings)
    return account


def test_epsilon_covers_every_round():
    account = rounds(ClientAccount(Budget(100.0, 1e-5), "rdp"), 20)
    assert account.epsilon() == epsilon([(1.0, 0.1, 20)], 1e-5, "rdp")
    assert account.unit == "client"


def test_a_cohort_of_fixed_size_earns_no_amplification():
    budget = Budget(100.0, 1e-5)
    fixed = rounds(ClientAccount(budget, "rdp"), 5, sampling="fixed")
    assert fixed.epsilon() == epsilon([(1.0, 1.0, 5)], 1e-5, "rdp")
    assert fixed.epsilon() > 2 * rounds(ClientAccount(budget, "rdp"), 5).epsilon()


def test_unequal_weights_are_refused():
    with pytest.raises(ValueError, match=r"strategy\.weighting = 'uniform'"):
        rounds(ClientAccount(Budget(100.0, 1e-5)), 1, weights=[10.0, 90.0])


def test_a_round_beyond_the_budget_is_refused():
    account = rounds(ClientAccount(Budget(3.0, 1e-5), "rdp"), 3)
    with pytest.raises(BudgetExceeded, match="epsilon = 3 per client"):
        rounds(account, 1000)
    assert len(account.history) == 3


def test_the_state_of_a_run_comes_back_from_its_tensors():
    for state in (PrivacyState(), PrivacyState((Spent(0.7, 1.0, 1), Spent(0.9, 0.1, 1)), 0.3)):
        assert PrivacyState.from_tensors(state.to_tensors()) == state
    counted = {"rounds": torch.tensor(3), "clip_norm": torch.tensor(0.5)}  # as older checkpoints hold it
    with pytest.raises(ValueError, match="3 rounds"):
        PrivacyState.from_tensors(counted)
