"""Means over seeds with Student's t intervals, and paired differences: what a comparison may claim."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

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
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(mean, quantile * math.sqrt(variance / count), count)


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
