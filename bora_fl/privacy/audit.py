"""Audit a privacy claim from one training run: how well can one tell which canaries were trained on?

Every one of m canaries goes into the training data with probability ½, independently. After training each gets a score
that should be higher if it was included, such as how far its loss fell. Of the canaries an auditor names the highest as
included and the lowest as not, k guesses in all, v of them right. If training is (ε, δ)-DP for records, then

    P[v right or more] ≤ f(v) + 2 m δ · max_{1 ≤ i ≤ v} (f(v − i) − f(v)) / i,
    f(v) = P[Binomial(k, e^ε / (1 + e^ε)) ≥ v]

(Steinke, Nasr and Jagielski, 2023, arXiv:2305.08846, theorem 5.2). An ε for which what was seen is too unlikely is
refuted; the largest such ε is a lower bound. A small bound proves nothing: better canaries may find more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from bora_fl.privacy.accounting import Unit
from bora_fl.privacy.gaussian import Randomness, SystemRandomness

_LARGEST_EPSILON = 100.0


@dataclass(frozen=True)
class AuditResult:
    """A lower bound of ε.

    Attributes:
        epsilon: With probability `confidence`, training was not (ε', δ)-DP for any ε' below this; 0: nothing was found.
        delta: δ of the claim.
        confidence: Probability with which the bound holds, over the inclusion of the canaries and the training.
        canaries: m.
        guesses: k of the best bound.
        correct: v of the best bound.
        unit: Whose presence was guessed.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    unit: Unit = "record"


def draw_inclusion(canaries: int, randomness: Randomness | None = None) -> Tensor:
    """Return which canaries to train on, `[canaries]`, bool, each with probability ½."""
    return (randomness or SystemRandomness()).uniform(canaries) < 0.5


def audit(
    scores: Tensor,
    included: Tensor,
    delta: float,
    *,
    confidence: float = 0.95,
    guesses: Sequence[int] | None = None,
) -> AuditResult:
    """Return a lower bound of the ε with which the canaries were trained.

    Args:
        scores: `[canaries]`, higher where inclusion is more likely. They must not depend on `included` but through
            training.
        included: `[canaries]`, bool, from `draw_inclusion`.
        delta: δ of the claim, in [0, 1).
        confidence: In (0, 1).
        guesses: Numbers of guesses to try, half on either end of the scores; they share the error `1 - confidence`.
            Chosen before looking. Left out: a 32nd, an 8th and a half of the canaries, and the lowest 8th and quarter
            by themselves: a model may do well by chance on what it has not seen, but seldom badly on what it has.

    Raises:
        ValueError: If an argument is out of range.
    """
    canaries = len(scores)
    if scores.shape != (canaries,) or included.shape != (canaries,) or included.dtype != torch.bool or canaries < 2:
        raise ValueError(
            f"scores {tuple(scores.shape)}, included {tuple(included.shape)} {included.dtype}: give one score and one "
            "bool for each of at least 2 canaries"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("scores: some are not finite; score canaries by a bounded loss")
    if not (0 < confidence < 1 and 0 <= delta < 1):
        raise ValueError(f"confidence = {confidence}, delta = {delta}: both are probabilities")
    halves = {max(1, k // 2) for k in guesses or (canaries // 32, canaries // 8, canaries // 2)}
    tried = [(half, half) for half in sorted(halves)]
    if guesses is None:
        tried += [(0, max(1, canaries // 8)), (0, max(1, canaries // 4))]
    if 2 * max(halves) > canaries:
        raise ValueError(f"guesses = {2 * max(halves)} with {canaries} canaries: one guess a canary is the most")
    ranked = included[scores.argsort(descending=True, stable=True)]
    results = []
    for highest, lowest in tried:
        correct = int(ranked[:highest].sum()) + int((~ranked[canaries - lowest :]).sum())
        found = lower_bound(canaries, highest + lowest, correct, delta, (1 - confidence) / len(tried))
        results.append(AuditResult(found, delta, confidence, canaries, highest + lowest, correct))
    return max(results, key=lambda result: result.epsilon)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """Return the largest ε under which `correct` of `guesses` has a probability of at most `error`, or 0."""
    low, high = 0.0, _LARGEST_EPSILON
    if p_value(canaries, guesses, correct, low, delta) > error:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) <= error:
            low = middle
        else:
            high = middle
    return low


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the bound on the probability of `correct` right guesses or more under (ε, δ)-DP; see the module."""
    tail = binom.sf(
        correct - 1 - np.arange(correct + 1), guesses, 1 / (1 + np.exp(-epsilon))
    )  # f(v), f(v - 1), ..., f(0)
    worst = max(((tail[1:] - tail[0]) / np.arange(1, correct + 1)).max(initial=0.0), 0.0)
    return float(min(1.0, tail[0] + 2 * canaries * delta * worst))
