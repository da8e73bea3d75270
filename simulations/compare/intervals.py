"""Means over seeds with Student's t intervals, and paired differences: what a comparison may claim."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: Sample mean.
        half_width: Half the 95 % interval's width; None for fewer than two values.
        count: Number of values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Collection[float]) -> Estimate | None:
    """Mean ± t_{n-1} s / √n, with s the sample standard deviation; None without values."""
    count = len(values)
    if count == 0:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return Estimate(mean, t_quantile((1 + CONFIDENCE) / 2, count - 1) * math.sqrt(variance / count), count)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The mean difference from a baseline over the seeds both have.

    With common random numbers the two of a seed share their partition, their clients and their data order, so that the
    differences vary less than the values do.
    """
    return estimate([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a whole population, such as the clients of a federation; 0 for none."""
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def t_distribution(t: float, degrees: int) -> float:
    """P(T ≤ t) for Student's t with whole degrees of freedom.

    With θ = atan(t / √ν), P(|T| ≤ t) is a finite sum of powers of cos θ (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if degrees % 2 else 1.0
    total = 0.0
    for k in range(3 if degrees % 2 else 2, degrees + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    within = 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total
    return (1 + within) / 2


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T ≤ t) = probability, by bisection.

    Args:
        probability: Between 0 and 1, both exclusive.
        degrees: Degrees of freedom, at least 1.

    Raises:
        ValueError: If either is out of range.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"t_quantile({probability}, {degrees}): needs 0 < probability < 1 and 1 degree of freedom")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < probability:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if t_distribution(middle, degrees) < probability else (low, middle)
    return high
