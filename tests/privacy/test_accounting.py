"""ε against Opacus, closed forms and an integral of our own; the noise that a budget asks for."""

import math

import numpy as np
import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.special import logsumexp, ndtr

from bora_fl.privacy import accounting
from bora_fl.privacy.accounting import EpsilonSummary, Spent, epsilon, merge_history, solve_noise, summarize

DELTA = 1e-5
HISTORIES = [
    [(1.0, 0.05, 100)],
    [(0.8, 0.01, 1000)],
    [(1.1, 0.05, 30), (0.9, 0.02, 20), (2.0, 0.2, 10)],
    [(4.0, 1.0, 50)],
]


def rdp_by_integration(noise, rate, order):
    """Rényi divergence of `(1-q) N(0, z²) + q N(1, z²)` from `N(0, z²)`, the larger of both directions, on a grid."""
    x = np.linspace(-60 * noise - order, 60 * noise + order, 60_001)
    log_p = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    log_shift = (2 * x - 1) / (2 * noise**2)
    log_q = log_p + (np.logaddexp(math.log1p(-rate), math.log(rate) + log_shift) if rate < 1 else log_shift)
    step = math.log(x[1] - x[0])
    there = logsumexp(order * log_q + (1 - order) * log_p) + step
    back = logsumexp(order * log_p + (1 - order) * log_q) + step
    return max(there, back) / (order - 1)


def epsilon_by_integration(history, delta):
    orders = [1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 8, 9, 10, 12, 14, 16, 20, 24]
    bounds = []
    for a in orders:
        spent = sum(steps * rdp_by_integration(noise, rate, a) for noise, rate, steps in history)
        bounds.append(spent + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1))
    return min(bounds)


def gaussian_delta(epsilon_, noise, steps):
    """δ of `steps` Gaussian releases at sample rate 1, exactly (Balle and Wang, 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise
    return ndtr(mu / 2 - epsilon_ / mu) - math.exp(epsilon_) * ndtr(-mu / 2 - epsilon_ / mu)


@pytest.mark.parametrize("history", HISTORIES)
def test_rdp_equals_an_integral_within_1_percent(history):
    assert epsilon(history, DELTA, "rdp") == pytest.approx(epsilon_by_integration(history, DELTA), rel=0.01)


@pytest.mark.parametrize("history", HISTORIES[:3])
@pytest.mark.parametrize(("name", "opacus"), [("prv", PRVAccountant), ("rdp", RDPAccountant)])
def test_equals_opacus_on_the_same_history(history, name, opacus):
    accountant = opacus()
    accountant.history = list(history)
    assert epsilon(history, DELTA, name) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)


@pytest.mark.parametrize(("noise", "steps"), [(4.0, 50), (1.0, 1), (10.0, 20)])
def test_prv_without_sampling_is_the_exact_gaussian_curve(noise, steps):
    found = epsilon([(noise, 1.0, steps)], DELTA)
    exact_delta = gaussian_delta(found, noise, steps)
    assert exact_delta <= DELTA
    # A little less ε would already break the promise.
    assert gaussian_delta(found - 0.03, noise, steps) > DELTA


@pytest.mark.parametrize("history", HISTORIES)
def test_prv_is_the_tighter_bound(history):
    assert epsilon(history, DELTA, "prv") < epsilon(history, DELTA, "rdp")


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_laws(accountant):
    base = epsilon([(1.0, 0.05, 50)], DELTA, accountant)
    assert epsilon([], DELTA, accountant) == 0.0
    assert epsilon([(1.0, 0.0, 50), (1.0, 0.1, 0)], DELTA, accountant) == 0.0
    assert epsilon([(1.0, 0.05, 20), (1.0, 0.05, 30)], DELTA, accountant) == base
    assert epsilon([(0.0, 0.05, 1), (1.0, 0.05, 50)], DELTA, accountant) == math.inf
    assert epsilon([(1.0, 0.05, 51)], DELTA, accountant) > base
    assert epsilon([(1.0, 0.06, 50)], DELTA, accountant) > base
    assert epsilon([(1.1, 0.05, 50)], DELTA, accountant) < base
    assert epsilon([(1.0, 0.05, 50)], DELTA / 10, accountant) > base


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_earlier_entries_count(accountant):
    """An accountant that reads the last entry alone would miss what was spent before."""
    last = [(2.0, 0.01, 1)]
    assert epsilon([(0.8, 0.05, 100), *last], DELTA, accountant) > 5 * epsilon(last, DELTA, accountant)


def test_gdp_is_refused():
    with pytest.raises(ValueError, match="understate ε, and Opacus' version reads only the last entry"):
        epsilon([(1.0, 0.05, 50)], DELTA, "gdp")


@pytest.mark.parametrize("history", [[(1e4, 0.01, 10)], [(0.05, 0.5, 10)], [(0.3, 1e-4, 1000)], [(1.0, 0.999, 1)]])
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_extreme_histories_have_a_finite_bound_or_none(history, accountant):
    assert epsilon(history, DELTA, accountant) >= 0.0


@pytest.mark.parametrize(
    ("target", "rate", "steps", "accountant"),
    [
        (3.0, 0.05, 300, "prv"),
        (3.0, 0.05, 300, "rdp"),
        (0.5, 0.01, 100, "rdp"),
        (8.0, 0.2, 60, "rdp"),
        (6.0, 1.0, 1, "rdp"),
    ],
)
def test_solved_noise_stays_within_the_target_and_wastes_little(target, rate, steps, accountant):
    noise = solve_noise(target, DELTA, rate, steps, accountant)
    assert 0.99 * target < epsilon([(noise, rate, steps)], DELTA, accountant) <= target
    assert epsilon([(0.98 * noise, rate, steps)], DELTA, accountant) > target


def test_noise_for_the_whole_run_is_more_than_for_one_round():
    """Solving for a round and repeating it would overspend."""
    one = solve_noise(3.0, DELTA, 0.05, 20, "rdp")
    assert epsilon([(one, 0.05, 200)], DELTA, "rdp") > 1.5 * 3.0
    assert solve_noise(3.0, DELTA, 0.05, 200, "rdp") > one


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(0.0, 0.1, 1), (math.inf, 0.1, 1), (1.0, 0.0, 1), (1.0, 0.1, 0), (1.0, 0.1, 10**10)]
)
def test_unsolvable_settings_are_named(target, rate, steps):
    with pytest.raises(ValueError, match=r"target_epsilon|sample_rate"):
        solve_noise(target, DELTA, rate, steps)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_solved_noise_makes_up_for_what_is_spent(accountant):
    spent = (Spent(4.0, 1.0, 4), Spent(2.0, 0.1, 10))
    noise = solve_noise(6.0, DELTA, 1.0, 8, accountant, spent)
    assert 0.99 * 6.0 < epsilon([*spent, (noise, 1.0, 8)], DELTA, accountant) <= 6.0
    assert noise > solve_noise(6.0, DELTA, 1.0, 8, accountant)
    with pytest.raises(ValueError, match=r"out of reach for 8 steps after .* spent"):
        solve_noise(1.0, DELTA, 1.0, 8, accountant, spent)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [
        (1e9, DELTA, 1.0, 12),
        (3.0, DELTA, 0.01, 10**6),
        (1.0, DELTA, 1.0, 10**9),
    ],
)
def test_whatever_is_asked_the_search_ends_after_a_few_tries(target, delta, rate, steps, monkeypatch):
    tries = []
    monkeypatch.setattr(accounting, "epsilon", lambda *a: tries.append(a) or epsilon(*a))
    noise = solve_noise.__wrapped__(target, delta, rate, steps)
    assert epsilon([(noise, rate, steps)], delta) <= target
    assert len(tries) < 60


@pytest.mark.parametrize("delta", [0.3, 1.0, 0.0, math.nan])
def test_a_delta_that_promises_next_to_nothing_is_refused_at_once(delta):
    with pytest.raises(ValueError, match=r"delta = .* well below 1 / \(number of units\)"):
        solve_noise(0.011, delta, 0.01, 12)


@pytest.mark.parametrize("jump", [0.013, 0.3, 1.0, 700.0])
@pytest.mark.parametrize("below", [6.1, 1e3, math.inf])
@pytest.mark.parametrize("above", [0.0, 5.0])
def test_the_search_ends_at_an_accountant_that_jumps_over_the_target(jump, below, above, monkeypatch):
    tries = []
    monkeypatch.setattr(
        accounting, "epsilon", lambda history, *_: tries.append(1) or (below if history[-1][0] < jump else above)
    )
    noise = solve_noise.__wrapped__(6.0, DELTA, 1.0, 12, "rdp")
    assert jump <= noise <= jump * 1.002
    assert len(tries) < 60


@pytest.mark.parametrize("history", [[(2.0, 0.01, 10**6)], [(5.0, 0.001, 10**8)]])
def test_a_history_too_long_for_a_grid_has_the_renyi_bound(history):
    assert epsilon(history, DELTA, "prv") == epsilon(history, DELTA, "rdp")


def test_epsilon_is_never_below_0():
    assert epsilon([(0.2, 0.01, 12)], 0.3) == 0.0


@pytest.mark.parametrize(
    "history", [[(4.0, 1.0, 4), (7.0, 1.0, 8)], [(2.0, 1.0, 1), (3.0, 1.0, 5), (2.5, 1.0, 6)], [(30.0, 1.0, 2)]]
)
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_rounds_of_unequal_noise_compose_to_no_less_than_the_exact_gaussian(history, accountant):
    """Releases with noise z_t are one Gaussian release of shift over noise √Σ z_t⁻²."""
    whole = 1 / math.sqrt(sum(steps / noise**2 for noise, _, steps in history))
    found = epsilon(history, DELTA, accountant)
    assert gaussian_delta(found, whole, 1) <= DELTA
    assert gaussian_delta(0.85 * found - 0.03, whole, 1) > DELTA


@pytest.mark.parametrize("entry", [(-1.0, 0.1, 1), (1.0, 1.1, 1), (1.0, 0.1, -1), (math.nan, 0.1, 1)])
def test_impossible_entries_are_refused(entry):
    with pytest.raises(ValueError, match="history entry"):
        merge_history([entry])


def test_over_clients_the_maximum_counts_and_never_a_sum():
    assert summarize({3: 1.0, 5: 4.0, 8: 2.0}) == EpsilonSummary(
        "record", clients=3, largest=4.0, median=2.0, smallest=1.0
    )
    with pytest.raises(ValueError, match="no client"):
        summarize({})
