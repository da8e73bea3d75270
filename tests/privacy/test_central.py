"""Client-level privacy: one client's reach, the noise on the merge's inputs, adaptive clipping, checked assumptions."""

import math

import pytest
import torch
from scipy.optimize import brentq
from scipy.special import ndtr

from bora_fl.blocks import BlockFactors, refactorize
from bora_fl.privacy.accounting import Budget, BudgetExceeded, Spent, epsilon, solve_noise
from bora_fl.privacy.central import (
    AdaptiveClip,
    ClientAccount,
    PrivacyState,
    adaptive_noised_mean,
    count_noise,
    noised_each,
    noised_mean,
)
from bora_fl.privacy.gaussian import SeededRandomness, clip, joint_norm

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
    shapes = {"w": torch.zeros(20_000)}
    each = noised_each(updates, shapes, 1.0, 1.0, 9, SeededRandomness(0))
    mean = sum(update["w"] for update in each) / 9
    shared = noised_mean(updates, shapes, 1.0, 1.0, 9, SeededRandomness(0))["w"]
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
    clipping = AdaptiveClip(clip_norm=0.01, count_noise=count_noise(0.9, len(updates)), quantile=quantile)
    randomness = SeededRandomness(0)
    for _ in range(150):
        _, clipping = adaptive_noised_mean(updates, SHAPES, clipping, 0.9, len(updates), randomness)
    norms = torch.tensor([joint_norm(update) for update in updates])
    within = (norms <= clipping.clip_norm).float().mean()
    assert within == pytest.approx(quantile, abs=0.05)


def test_updates_and_count_together_spend_the_noise_multiplier():
    """Two Gaussian releases of sensitivity 1 compose to one: 1/z² = 1/z_Δ² + 1/σ_b²."""
    clipping = AdaptiveClip(clip_norm=1.0, count_noise=2.0)
    update_noise = clipping.update_noise(1.1)
    assert update_noise > 1.1
    assert pytest.approx(update_noise**-2 + 2.0**-2) == 1.1**-2
    composed = epsilon([(update_noise, 1.0, 7), (2.0, 1.0, 7)], 1e-5, "rdp")
    assert composed == pytest.approx(epsilon([(1.1, 1.0, 7)], 1e-5, "rdp"), rel=1e-6)


def test_a_count_that_would_spend_everything_is_refused():
    with pytest.raises(ValueError, match=r"use a count_noise above 1"):
        AdaptiveClip(clip_norm=1.0, count_noise=0.9).update_noise(1.0)
    with pytest.raises(ValueError, match="count_noise"):
        AdaptiveClip(clip_norm=1.0, count_noise=0.0).update_noise(1.0)


@pytest.mark.parametrize("settings", [{"clip_norm": math.inf}, {"quantile": 1.0}, {"rate": 0.0}, {"count_noise": -1.0}])
def test_adaptive_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdaptiveClip(**({"clip_norm": 1.0, "count_noise": 1.0} | settings))


class Constant:
    """No randomness: every normal value is the same, so that a mechanism's deterministic part and its noise show."""

    def __init__(self, value: float) -> None:
        self.value = value

    def normal(self, count: int) -> torch.Tensor:
        return torch.full((count,), self.value, dtype=torch.float64)

    def uniform(self, count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.float64) / count


def exact_delta(epsilon_: float, mu: float) -> float:
    """δ of a Gaussian release whose shift over its noise is μ (Balle and Wang, 2018, theorem 8)."""
    return float(ndtr(mu / 2 - epsilon_ / mu) - math.exp(epsilon_) * ndtr(-mu / 2 - epsilon_ / mu))


def exact_epsilon(mu: float, delta: float) -> float:
    return float(brentq(lambda e: exact_delta(e, mu) - delta, 0.0, 200.0))


def adaptive_release(updates, clipping, z, expected, value):
    """What an observer sees of an adaptive round: the mean, and the count by the next clipping norm."""
    mean, after = adaptive_noised_mean(updates, SHAPES, clipping, z, expected, Constant(value))
    count = -math.log(after.clip_norm / clipping.clip_norm) / clipping.rate * expected
    return torch.cat([flat(mean).double(), torch.tensor([count], dtype=torch.float64)])


@pytest.mark.parametrize("clients", [2, 3, 10, 40, 400])
@pytest.mark.parametrize("neighbour", ["zero", "missing"])
def test_an_adaptive_round_tells_no_more_of_a_client_than_its_noise_multiplier_says(clients, neighbour):
    """Shift over noise of the joint release, measured on the mechanism itself, gives the exact ε of 12 rounds."""
    z, delta, rounds = solve_noise(5.99, 1e-5, 1.0, 12, "rdp"), 1e-5, 12
    clipping = AdaptiveClip(clip_norm=1.0, count_noise=count_noise(z, clients))
    zero = {name: torch.zeros_like(t) for name, t in SHAPES.items()}
    large = {name: 10 * torch.ones_like(t) for name, t in SHAPES.items()}
    others = [zero if k % 2 else large for k in range(clients - 1)]
    changed = [*others, zero] if neighbour == "zero" else others
    shift = adaptive_release([*others, large], clipping, z, clients, 0.0)
    shift -= adaptive_release(changed, clipping, z, clients, 0.0)
    # A small draw, so that the share is not cut.
    noise = adaptive_release(others, clipping, z, clients, 1e-3) - adaptive_release(others, clipping, z, clients, 0.0)
    mu = math.sqrt(rounds) * float((shift / (noise * 1e3)).norm())
    said = epsilon([(z, 1.0, rounds)], delta, "rdp")
    assert exact_epsilon(mu, delta) <= said
    if neighbour == "zero":
        assert mu == pytest.approx(math.sqrt(rounds) / z, rel=1e-3)  # and wastes nothing


@pytest.mark.parametrize("clients", [2, 3, 11, 1000])
@pytest.mark.parametrize("z", [0.1, 1.0, 50.0])
def test_counting_starts_for_any_number_of_clients_and_costs_little(clients, z):
    assert z < AdaptiveClip(1.0, count_noise(z, clients)).update_noise(z) <= 1.055 * z


def test_no_draw_of_the_count_moves_the_clip_norm_by_more_than_its_rate():
    for value in (-1e3, 1e3):
        _, after = adaptive_noised_mean(make_updates(3), SHAPES, AdaptiveClip(1.0, 9.0), 1.0, 3, Constant(value))
        assert abs(math.log(after.clip_norm)) <= 0.2 * 0.5 + 1e-9


# One by one


def test_a_missing_client_is_a_noised_zero():
    found = noised_each(make_updates(2), SHAPES, 1.0, 1.0, 5, SeededRandomness(0))
    assert len(found) == 5
    assert all(float(flat(update).norm()) > 0 for update in found)
    quiet = noised_each(make_updates(2), SHAPES, 1.0, 0.0, 5, SeededRandomness(0))
    assert sum(float(flat(update).norm()) > 0 for update in quiet) == 2


def test_the_place_of_an_update_does_not_tell_whose_it_is():
    updates = [{"w": torch.tensor([float(k)])} for k in range(1, 5)]
    places = {
        tuple(float(u["w"]) for u in noised_each(updates, {"w": torch.zeros(1)}, 9.0, 0.0, 4, SeededRandomness(seed)))
        for seed in range(20)
    }
    assert len(places) > 10
    assert all(sorted(order) == [1.0, 2.0, 3.0, 4.0] for order in places)


def test_more_updates_than_the_cohort_are_refused():
    with pytest.raises(ValueError, match="expected_clients = 1"):
        noised_each(make_updates(2), SHAPES, 1.0, 1.0, 1)


# Short dtypes


def test_one_client_moves_a_bfloat16_sum_by_no_more_than_the_clip_norm():
    """Beside a large sum bfloat16 would round what a client adds up or down by as much as it is."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": torch.zeros(500, dtype=torch.float64)}
    updates = [{"w": (torch.randn(500, generator=generator) + 1).bfloat16()} for _ in range(64)]
    with_all, without = (noised_mean(u, shapes, 0.7, 0.0, 1)["w"] for u in (updates, updates[:-1]))
    assert float((with_all - without).norm()) <= 0.7 * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clipping_a_short_dtype_keeps_the_bound(dtype):
    update = {"w": torch.linspace(0.1, 3.0, 1001).to(dtype)}
    for clip_norm in (0.3, 1.0, 7.7):
        clipped, _ = clip(update, clip_norm)
        assert joint_norm(clipped) <= clip_norm * (1 + 1e-12)


def test_a_noised_short_dtype_keeps_its_dtype():
    update = {"w": torch.ones(5, dtype=torch.bfloat16)}
    assert noised_each([update], update, 1.0, 1.0, 1)[0]["w"].dtype == torch.bfloat16
    assert noised_mean([update], update, 1.0, 1.0, 1)["w"].dtype == torch.bfloat16


# The size of the noise


@pytest.mark.parametrize("seed", [0, 1])
def test_the_noise_has_the_variance_of_sensitivity_times_multiplier(seed):
    """Sample variance over n draws lies within 4 standard errors, σ² √(2/n), of (z C / K)²."""
    n, z, clip_norm, clients = 200_000, 1.7, 0.3, 4
    shapes = {"a": torch.zeros(n // 4), "b": torch.zeros(n // 2, 1), "c": torch.zeros(n // 4, dtype=torch.float64)}
    drawn = noised_mean([], shapes, clip_norm, z, clients, SeededRandomness(seed))
    values = torch.cat([t.double().flatten() for t in drawn.values()])
    expected = (z * clip_norm / clients) ** 2
    assert abs(float(values.square().mean()) / expected - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(values.mean())) < 4 * math.sqrt(expected / n)
    each = noised_each([], {"a": torch.zeros(n // 2)}, clip_norm, z, 2, SeededRandomness(seed))
    values = torch.cat([update["a"].double() for update in each])
    assert abs(float(values.square().mean()) / (z * clip_norm) ** 2 - 1) < 4 * math.sqrt(2 / n)
    halves = values.view(2, -1)
    assert abs(float((halves[0] * halves[1]).mean())) < 4 * (z * clip_norm) ** 2 / math.sqrt(n / 2)


# The account


@pytest.mark.parametrize(
    "state",
    [
        PrivacyState(),
        PrivacyState((Spent(1.1, 1.0, 1),)),
        PrivacyState((Spent(1 / 3, 1.0, 1), Spent(2.7, 0.1, 1)), 0.1),
    ],
)
def test_what_is_kept_between_rounds_survives_a_checkpoint(state):
    assert PrivacyState.from_tensors(state.to_tensors()) == state


def test_rounds_whose_noise_is_not_known_are_refused():
    with pytest.raises(ValueError, match=r"3 rounds .* not their noise"):
        PrivacyState.from_tensors({"rounds": torch.tensor(3), "clip_norm": torch.tensor(0.5)})


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
