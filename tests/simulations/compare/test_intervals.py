import math

import numpy as np
import pytest
from scipy import stats

from bora_fl.simulations.compare.intervals import Estimate, estimate, paired, spread


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_the_interval_is_scipys(count: int):
    values = np.random.default_rng(count).normal(0.7, 0.02, count)
    found = estimate(values.tolist())
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert found is not None
    assert found.half_width is not None
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), rel=1e-9)
    assert found.count == count


def test_one_value_has_no_interval_and_none_no_estimate():
    assert estimate([]) is None
    assert estimate([0.3]) == Estimate(0.3, None, 1)
    assert not Estimate(0.3, None, 1).excludes_zero


def test_paired_differences_are_scipys_and_take_common_seeds_only():
    rng = np.random.default_rng(0)
    base = {seed: float(rng.normal(0.6, 0.1)) for seed in range(6)}
    other = {seed: value + 0.02 + float(rng.normal(0, 0.005)) for seed, value in base.items()}
    found = paired(other | {7: 0.9}, base | {8: 0.1})
    interval = stats.ttest_rel(list(other.values()), list(base.values())).confidence_interval(0.95)
    assert found is not None
    assert found.half_width is not None
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(interval), rel=1e-9)
    assert found.count == 6
    assert found.excludes_zero
    alone = estimate(list(other.values()))
    assert alone is not None
    assert alone.half_width is not None
    assert found.half_width < alone.half_width / 5  # what common random numbers are for


def test_a_paired_difference_changes_sign_with_its_sides():
    a, b = {0: 0.5, 1: 0.6, 2: 0.55}, {0: 0.45, 1: 0.61, 2: 0.5}
    there, back = paired(a, b), paired(b, a)
    assert there is not None
    assert back is not None
    assert (there.mean, there.half_width) == pytest.approx((-back.mean, back.half_width))
    assert paired(a, {5: 0.1}) is None


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(1)
    samples = rng.normal(0.5, 0.1, (4000, 3))
    found = [estimate(sample.tolist()) for sample in samples]
    covered = sum(abs(e.mean - 0.5) <= e.half_width for e in found if e is not None and e.half_width is not None)
    assert abs(covered / len(samples) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / len(samples))


def test_spread_is_the_population_deviation():
    values = [0.2, 0.5, 0.9, 0.4]
    assert spread(values) == pytest.approx(np.std(values))
    assert spread([]) == 0.0
    assert spread([0.7]) == 0.0
