"""A comparison from its plan to its report."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bora_fl.config import ConfigError
from bora_fl.data import fetch
from bora_fl.granted import num_cores
from bora_fl.simulations.compare import report, results
from bora_fl.simulations.compare.plan import Plan, Variant
from bora_fl.simulations.compare.results import Results
from bora_fl.simulations.compare.scenarios import near_misses
from bora_fl.simulations.grid import run_grid


@dataclass(frozen=True)
class Comparison:
    """What a comparison measured, and the files that hold it."""

    results: Results
    paths: list[Path]


def baseline_of(name: str, variants: list[Variant]) -> Variant:
    """The variant that a name means: ``strategy`` or ``method/strategy``; the first if it is empty.

    Raises:
        ConfigError: If it is not among them.
    """
    if not name:
        return variants[0]
    for variant in variants:
        if name in (str(variant), variant.strategy):
            return variant
    known = [*map(str, variants), *dict.fromkeys(v.strategy for v in variants)]
    raise ConfigError(f"--baseline {name!r}: it is not among what is compared; {near_misses(name, known)}")


def run_comparison(
    plan: Plan, baseline: Variant, *, target: float, workers: int, threads: int, console: Console
) -> Comparison:
    """Run what is not finished, and write the results and the report.

    Args:
        plan: The runs.
        baseline: What differences are from.
        target: Accuracy for bytes to target; 0 is the baseline's own.
        workers: Runs at once; 0 is cores divided by `threads`.
        threads: Torch threads of each.
        console: Shows the progress.

    Raises:
        ConfigError: If another process is at work in the plan's folder.
        FetchError: If an embedded data set cannot be made here.
    """
    for data in {run.settings.data.name for run in plan.runs}:
        if data.startswith("embedded:"):
            fetch(data)  # once, before the workers ask for it
    for reason in plan.reasons():
        console.print(f"skipped: {reason}", highlight=False, markup=False)
    at_once = min(workers or max(1, num_cores() // threads), len(plan.runs))
    root = plan.runs[0].root
    console.print(f"{len(plan.runs)} runs, {at_once} at once, in {root}", highlight=False, soft_wrap=True)
    ended = run_grid(plan.runs, root, workers=at_once, threads=threads, console=console, title="comparing")
    found = results.collect(plan, ended, baseline, target or None)
    return Comparison(found, [*results.write(found, root), *report.write(found, root)])
