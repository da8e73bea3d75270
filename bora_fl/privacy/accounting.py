"""How much privacy a history of subsampled Gaussian steps has spent, on whichever side the noise is added.

A history is a sequence of `(noise_multiplier, sample_rate, steps)`: each step adds Gaussian noise of standard deviation
`noise_multiplier · clip_norm` to a sum over units (records or clients), each drawn independently with probability
`sample_rate` and contributing at most `clip_norm`. Composition does not depend on the order: equal pairs are merged.

Two accountants, both upper bounds: `"prv"` composes privacy loss distributions numerically (Gopi et al., 2021,
arXiv:2106.02848), `"rdp"` composes Rényi divergences (Mironov et al., 2019, arXiv:1908.10530, converted to (ε, δ) by
Balle et al., 2020, arXiv:1905.09982, theorem 21). The arithmetic is that of Opacus.
"""

import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

Accountant = Literal["prv", "rdp"]
Unit = Literal["record", "client"]

# Opacus' orders, and some above them for the small ε of a large noise.
_RDP_ORDERS = [1 + tenth / 10 for tenth in range(1, 100)] + [*range(12, 64), 96, 192]
# Beyond this ε no guarantee is left to refine, and PRV's grid would only grow with it.
_LARGEST_PRV_EPSILON = 50.0
# PRV's work grows with the points of its grid: above this many, which take seconds, Rényi's bound stands.
_LARGEST_PRV_GRID = 2**20
_PRV_ERROR = 0.01
_SMALLEST_NOISE, _LARGEST_NOISE = 1e-2, 1e6
_LARGEST_DELTA, _MOST_STEPS = 0.1, 10**9
# Share of a target that solved noise may leave unspent.
SLACK = 0.005


class Spent(NamedTuple):
    """One entry of a history.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm; 0 is no privacy.
        sample_rate: Probability with which a unit takes part in a step, in [0, 1].
        steps: Number of noised steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True)
class Budget:
    """The most that may be spent.

    Args:
        epsilon: ε, above 0; infinity only keeps the account.
        delta: δ, in (0, 1).

    Raises:
        ValueError: If one is out of range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"epsilon = {self.epsilon}: a budget is above 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta = {self.delta}: it is a probability; use a value well below 1 / (number of units)")


class BudgetExceeded(RuntimeError):  # noqa: N818  (named for what happened, as it reads in a log)
    """Training was refused, and nothing was trained: it would have spent more than the budget.

    Args:
        source: Whose budget it is, for the message.
        budget: What is allowed.
        spent: ε spent so far.
        refused: The steps that were asked for.
        requested: ε that they would have led to.
        unit: Whose presence is hidden.
    """

    def __init__(self, source: str, budget: Budget, spent: float, refused: Spent, requested: float, unit: Unit) -> None:
        super().__init__(
            f"privacy budget: {source} allows epsilon = {budget.epsilon:g} per {unit} at delta = {budget.delta:g}; "
            f"{spent:.4g} is spent, and {refused.steps} more steps (noise multiplier {refused.noise_multiplier:g}, "
            f"sample rate {refused.sample_rate:g}) would make it {requested:.4g}. Nothing was trained. Take fewer "
            "steps or rounds, or solve the noise for all of them; a larger budget is the data owner's decision."
        )
        self.spent, self.requested, self.budget = spent, requested, budget.epsilon


@dataclass(frozen=True)
class EpsilonSummary:
    """ε over clients: each protects its own units, so the largest is the guarantee and a sum means nothing.

    Attributes:
        unit: Whose presence is hidden.
        clients: How many clients are summarized.
        largest: The guarantee that holds for every unit of every client.
        median: Half of the clients spent at most this.
        smallest: The least any client spent.
    """

    unit: Unit
    clients: int
    largest: float
    median: float
    smallest: float


def epsilon(history: Iterable[tuple[float, float, int]], delta: float, accountant: Accountant = "prv") -> float:
    """Return an upper bound of the ε that a history has spent at `delta`.

    Args:
        history: `(noise_multiplier, sample_rate, steps)` entries, in any order.
        delta: δ, in (0, 1).
        accountant: `"prv"` (tighter) or `"rdp"`.

    Returns:
        ε: 0 for an empty history, infinity if a step had no noise.

    Raises:
        ValueError: If an entry, `delta` or `accountant` is not usable.
    """
    _require_accountant(accountant)
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: it is a probability; use a value well below 1 / (number of units)")
    merged = merge_history(history)
    if not merged:
        return 0.0
    if any(entry.noise_multiplier == 0 for entry in merged):
        return math.inf
    by_rdp = _epsilon_by_rdp(merged, delta)
    if accountant == "rdp" or by_rdp > _LARGEST_PRV_EPSILON or _prv_grid(merged, delta, by_rdp) > _LARGEST_PRV_GRID:
        return by_rdp
    return _epsilon_by_prv(merged, delta, fallback=by_rdp)


def merge_history(history: Iterable[tuple[float, float, int]]) -> list[Spent]:
    """Return the history sorted, the steps of equal `(noise_multiplier, sample_rate)` added up, idle entries left out.

    Raises:
        ValueError: If an entry is out of range.
    """
    steps_of: dict[tuple[float, float], int] = defaultdict(int)
    for noise_multiplier, sample_rate, steps in history:
        if not (noise_multiplier >= 0 and 0 <= sample_rate <= 1 and steps >= 0):
            raise ValueError(
                f"history entry {(noise_multiplier, sample_rate, steps)}: noise and steps are at least 0, and "
                "the sample rate is in [0, 1]"
            )
        if steps and sample_rate:
            steps_of[float(noise_multiplier), float(sample_rate)] += int(steps)
    return [Spent(*pair, steps) for pair, steps in sorted(steps_of.items())]


@lru_cache(maxsize=64)  # every round of every client asks for the same few, and an answer takes seconds
def solve_noise(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    total_steps: int,
    accountant: Accountant = "prv",
    spent: tuple[Spent, ...] = (),
) -> float:
    """Return a noise multiplier with which `total_steps` more steps stay within `target_epsilon`.

    Solve once for all steps of the run, not for each round: the budget is spent by their composition. The search is a
    bisection whose number of tries is bounded, and so is the work of each, whatever is asked.

    Args:
        target_epsilon: ε to stay within, finite and above 0.
        delta: δ, in (0, 0.1]; above that PRV's curve jumps, and there is little left to promise.
        sample_rate: Probability with which a unit takes part in a step, in (0, 1].
        total_steps: Steps still to come, from 1 to 10⁹.
        accountant: The accountant that will check the budget.
        spent: What the same units have spent before.

    Returns:
        The noise multiplier, at least 0.01: `epsilon([*spent, (it, sample_rate, total_steps)], delta, accountant)` is
        at most `target_epsilon`, and within 0.5 % of it unless the least noise, or an accountant that jumps there,
        leaves more.

    Raises:
        ValueError: If an argument is out of range or no noise reaches the target.
    """
    if not target_epsilon > 0 or not math.isfinite(target_epsilon):
        raise ValueError(
            f"target_epsilon = {target_epsilon}: use a finite value above 0; without a budget there is no noise"
        )
    if not 0 < delta <= _LARGEST_DELTA:
        raise ValueError(
            f"delta = {delta}: use a value well below 1 / (number of units), at most {_LARGEST_DELTA}; that share of "
            "them may be published in full"
        )
    if not 0 < sample_rate <= 1 or not 1 <= total_steps <= _MOST_STEPS:
        raise ValueError(
            f"sample_rate = {sample_rate}, total_steps = {total_steps}: the rate is in (0, 1], the steps are from 1 to "
            f"{_MOST_STEPS:.0e}"
        )

    def reached(noise_multiplier: float) -> float:
        return epsilon([*spent, (noise_multiplier, sample_rate, total_steps)], delta, accountant)

    # Rényi's bound is quick, and close to PRV's: the search starts from where it ends.
    start = 1.0 if accountant == "rdp" else _start(target_epsilon, delta, sample_rate, total_steps, spent)
    step = 2.0 if accountant == "rdp" else 1.1
    low = high = start
    at_low = at_high = reached(start)
    while at_high > target_epsilon:
        low, at_low = high, at_high
        high, step = high * step, step**2
        if high > _LARGEST_NOISE:
            before = f" after {epsilon(spent, delta, accountant):.4g} spent" if spent else ""
            raise ValueError(
                f"target_epsilon = {target_epsilon} at delta = {delta} is out of reach for {total_steps} steps{before};"
                " raise it, or plan fewer steps (the PRV accountant cannot certify less than 0.01)"
            )
        at_high = reached(high)
    while at_low <= target_epsilon:
        high, at_high = low, at_low
        if high <= _SMALLEST_NOISE:
            return high
        low, step = max(low / step, _SMALLEST_NOISE), step**2
        at_low = reached(low)
    # log ε is close to linear in log noise: every other try interpolates, a little on the safe side, the rest bisect.
    interpolate = True
    while at_high < (1 - SLACK) * target_epsilon and high > (1 + SLACK / 5) * low:
        share = 0.5
        if interpolate and at_high > 0 and math.isfinite(at_low):
            share = math.log(at_low / (1 - SLACK / 2) / target_epsilon) / math.log(at_low / at_high)
        interpolate = not interpolate
        middle = low * (high / low) ** min(max(share, 0.02), 0.98)
        at_middle = reached(middle)
        if at_middle <= target_epsilon:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


def _start(
    target_epsilon: float, delta: float, sample_rate: float, total_steps: int, spent: tuple[Spent, ...]
) -> float:
    try:
        return solve_noise(target_epsilon, delta, sample_rate, total_steps, "rdp", spent)
    except ValueError:  # Rényi's bound alone may be past the target
        return 1.0


def summarize(epsilons: Mapping[int, float] | Mapping[str, float], unit: Unit = "record") -> EpsilonSummary:
    """Return the maximum and the distribution of ε over clients.

    Args:
        epsilons: Client to the ε it has spent, all at the same δ.
        unit: Whose presence is hidden.

    Raises:
        ValueError: If there is no client.
    """
    values = list(epsilons.values())
    if not values:
        raise ValueError("epsilons is empty: no client reported what it spent")
    return EpsilonSummary(unit, len(values), max(values), statistics.median(values), min(values))


def _require_accountant(accountant: str) -> None:
    if accountant == "gdp":
        raise ValueError(
            "accountant = 'gdp': its central-limit approximation can understate ε, and Opacus' version reads only the "
            "last entry of a history; use 'prv' or 'rdp'"
        )
    if accountant not in ("prv", "rdp"):
        raise ValueError(f"accountant = {accountant!r} is unknown; use 'prv' or 'rdp'")


# Opacus is imported where it is used: it loads for seconds, and a client without DP never needs it.


def _epsilon_by_rdp(history: list[Spent], delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with _quiet():
        rdp = sum(entry.steps * _rdp_of_a_step(entry.noise_multiplier, entry.sample_rate) for entry in history)
        found, _ = get_privacy_spent(orders=_RDP_ORDERS, rdp=rdp, delta=delta)
    return max(0.0, float(found))


@lru_cache(maxsize=1024)
def _rdp_of_a_step(noise_multiplier: float, sample_rate: float) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    from opacus.accountants.analysis.rdp import compute_rdp

    found = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=_RDP_ORDERS)
    return np.asarray(found, dtype=np.float64)


def _prv_grid(history: list[Spent], delta: float, by_rdp: float) -> float:
    """About how many points the grid of the PRV accountant has, from its own formula for the mesh."""
    steps = sum(entry.steps for entry in history)
    mesh = _PRV_ERROR / math.sqrt(steps * math.log(12 / (delta * 1e-3)) / 2)
    return 2 * (by_rdp + 3) / mesh


def _epsilon_by_prv(history: list[Spent], delta: float, fallback: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [tuple(entry) for entry in history]
    with _quiet():
        try:
            found = float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
        except (RuntimeError, ValueError, IndexError):
            # The grid could not hold the distribution (extreme noise or rate): the other bound stands.
            return fallback
    return max(0.0, found) if math.isfinite(found) else fallback


@contextmanager
def _quiet() -> Iterator[None]:
    # Opacus warns when the best order is the last one tried, where the bound is looser and still a bound. NumPy warns
    # of the logarithm of 0 at sample rate 1, and of overflow at orders that diverge.
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", UserWarning)
        yield
