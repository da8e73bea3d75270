"""A learning rate for every variant of a comparison, searched on seeds of its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bora_fl.config import ConfigError, Scalar, parse
from bora_fl.report import read_rows
from bora_fl.simulations.compare.plan import CompareRun, Plan, Variant
from bora_fl.simulations.grid import Outcome

FIRST_SEED = 1000  # far from the seeds that are reported
RATES = "0.3,1,3"

Chosen = dict[tuple[str, Variant], float]
"""Scenario and variant to the learning rate it is reported with."""


def factors_of(text: str) -> list[float]:
    """The multiples of each variant's own learning rate that are tried.

    Raises:
        ConfigError: If one is no number above 0.
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(factor > 0 and math.isfinite(factor) for factor in found):
        raise ConfigError(f"--rates {text!r}: give multiples above 0 of each variant's learning rate, such as {RATES}")
    return sorted(set(found))


def tuning_runs(plan: Plan, factors: Sequence[float], seeds: int) -> list[CompareRun]:
    """One run for each scenario, variant, factor and tuning seed; both learning rates are scaled.

    Raises:
        ConfigError: If there is no seed, or one is a reported run's.
    """
    if seeds < 1:
        raise ConfigError(f"--tune-seeds {seeds}: give at least 1")
    chosen_on = range(FIRST_SEED, FIRST_SEED + seeds)
    if reported := {run.seed for run in plan.runs}.intersection(chosen_on):
        raise ConfigError(
            f"--first-seed {min(run.seed for run in plan.runs)} with --tune: rates are chosen on seed {min(reported)}, "
            f"which would be reported too; give seeds outside {FIRST_SEED} to {chosen_on[-1]}"
        )
    templates = {(run.scenario, run.variant): run for run in plan.runs}
    return [
        _at_rate(replace(run, purpose="tune", seed=seed), run.settings.train.learning_rate * factor)
        for run in templates.values()
        for seed in chosen_on
        for factor in factors
    ]


def choose(outcomes: Sequence[tuple[CompareRun, Outcome]]) -> Chosen:
    """The rate of least held-out loss, mean over the tuning seeds; a run that failed counts as infinite.

    A variant that failed at every rate has none: it stays at its own, and stands in the report with what comes of it.

    The loss is that of the clients' held-out parts after the last round; where sites release none, as under privacy,
    that of the central test set. Between equals, the smallest rate.
    """
    losses: dict[tuple[str, Variant], dict[float, list[float]]] = {}
    for run, end in outcomes:
        rates = losses.setdefault((run.scenario, run.variant), {})
        rates.setdefault(run.settings.train.learning_rate, []).append(
            _loss(run) if end.status == "finished" else math.inf
        )
    chosen: Chosen = {}
    for (scenario, variant), rates in losses.items():
        means = {rate: math.fsum(found) / len(found) for rate, found in sorted(rates.items())}
        best = min(means, key=means.__getitem__)
        if math.isfinite(means[best]):
            chosen[scenario, variant] = best
    return chosen


def doubts(outcomes: Sequence[tuple[CompareRun, Outcome]], chosen: Chosen) -> list[str]:
    """A line for every variant whose rate is the smallest or the largest tried, or that failed at all of them."""
    rates: dict[tuple[str, Variant], set[float]] = {}
    for run, _ in outcomes:
        rates.setdefault((run.scenario, run.variant), set()).add(run.settings.train.learning_rate)
    lines = []
    for (scenario, variant), tried in rates.items():
        rate = chosen.get((scenario, variant))
        if rate is None:
            shown = ", ".join(f"{one:g}" for one in sorted(tried))
            lines.append(f"{variant} in {scenario}: failed at every rate of {shown}; it is run at its own")
        elif len(tried) > 1 and rate in (min(tried), max(tried)):
            lines.append(f"{variant} in {scenario}: {rate:g} is at the edge of the rates tried; widen --rates")
    return lines


def tuned(plan: Plan, chosen: Mapping[tuple[str, Variant], float]) -> Plan:
    """The plan with every run at its variant's rate, where one was chosen."""
    runs = [
        _at_rate(run, chosen.get((run.scenario, run.variant), run.settings.train.learning_rate)) for run in plan.runs
    ]
    return replace(plan, runs=runs)


def _at_rate(run: CompareRun, rate: float) -> CompareRun:
    train = run.settings.train
    head = train.head_learning_rate * rate / train.learning_rate
    own: dict[str, Scalar] = {"train.learning-rate": rate, "train.head-learning-rate": head, "run.seed": run.seed}
    return replace(run, settings=parse(run.settings.flat() | own))


def _loss(run: CompareRun) -> float:
    last = read_rows(run.folder / "metrics.jsonl")[-1]
    found = last["client_loss"] if last["client_loss"] is not None else last["loss"]
    return float(found) if found is not None and math.isfinite(found) else math.inf
