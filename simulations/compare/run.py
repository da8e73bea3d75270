"""A comparison from its plan to its report."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rich.console import Console

from bora_fl.config import ConfigError
from bora_fl.data import fetch, partition
from bora_fl.granted import num_cores
from bora_fl.simulations.compare import report, results, tuning
from bora_fl.simulations.compare.plan import CompareRun, Plan, Variant
from bora_fl.simulations.compare.references import reference_runs
from bora_fl.simulations.compare.results import Results
from bora_fl.simulations.compare.scenarios import near_misses
from bora_fl.simulations.compare.timing import seconds_left
from bora_fl.simulations.grid import Outcome, run_grid


@dataclass(frozen=True)
class Compared:
    """What a comparison measured.

    Attributes:
        results: The summaries and every run.
        paths: The files that hold them.
        failed: How many runs failed, those beside the comparison among them.
        runs: How many there were.
    """

    results: Results
    paths: list[Path]
    failed: int
    runs: int


@dataclass(frozen=True)
class Comparison:
    """A plan, and what is run before and beside it.

    Attributes:
        plan: The runs that are compared.
        baseline: What differences are from.
        factors: Multiples of each variant's learning rate that are tried on seeds of their own; empty is no search.
        tune_seeds: How many seeds these are.
        baselines: Which references are measured, of `references.BASELINES`.
        workers: Runs at once; 0 is cores divided by `threads`.
        threads: Torch threads of each.
        console: Shows the progress.
    """

    plan: Plan
    baseline: Variant
    factors: Sequence[float] = ()
    tune_seeds: int = 1
    baselines: Collection[str] = ()
    workers: int = 0
    threads: int = 1
    console: Console = field(default_factory=lambda: Console(stderr=True))

    @property
    def root(self) -> Path:
        """The comparison's folder."""
        return self.plan.runs[0].root

    @property
    def at_once(self) -> int:
        """Runs at once."""
        return max(1, self.workers or num_cores() // self.threads)

    @cached_property
    def trials(self) -> list[CompareRun]:
        """The runs that choose learning rates."""
        return tuning.tuning_runs(self.plan, self.factors, self.tune_seeds) if self.factors else []

    def beside(self, plan: Plan) -> list[CompareRun]:
        """The references' runs of a plan."""
        return reference_runs(plan, self.baseline, self.baselines)

    def describe(self) -> str:
        """How many runs there are, and where."""
        beside = len(self.beside(self.plan))
        counts = f"{len(self.plan.runs)} runs, {len(self.trials)} to tune them and {beside} beside them"
        return f"{counts}, {self.at_once} at once, in {self.root}"

    def seconds_left(self) -> float:
        """An estimate of the wall clock of what is not finished."""
        return seconds_left([*self.trials, *self.plan.runs, *self.beside(self.plan)], self.at_once)

    def fetch(self) -> None:
        """Make the embedded data sets once, before the workers ask for them.

        Raises:
            FetchError: If one cannot be made here.
        """
        for data in {run.settings.data.name for run in self.plan.runs}:
            if data.startswith("embedded:"):
                fetch(data)

    def check(self) -> None:
        """Refuse what no run could use: each data set and model of the plan is looked at once, and each deal.

        Raises:
            ConfigError: With a line for each finding.
        """
        from bora_fl.deployment.doctor.preflight import preflight

        first: dict[tuple[str, str], CompareRun] = {}
        for run in self.plan.runs:
            first.setdefault((run.settings.data.name, run.settings.model.name), run)
        for run in first.values():
            preflight(run.settings)
        # Whether a Dirichlet deal can be depends on the seed.
        dealt = {run.scenario: run for run in self.plan.runs if run.settings.data.partition != "dirichlet"}
        impossible = []
        for name, run in sorted(dealt.items(), key=lambda item: item[1].settings.data.name):
            try:
                numbers = run.settings.model.kind.number
                partition(run.settings.data, run.num_clients, run.seed, numbers=numbers)
            except ConfigError as error:
                impossible.append(f"--scenarios {name}: {error}")
        if impossible:
            raise ConfigError("\n".join(impossible))

    def run(self, target: float = 0.0) -> Compared:
        """Run what is not finished, and write the results and the report.

        Args:
            target: Accuracy for bytes to target; 0 is the baseline's own.

        Raises:
            ConfigError: If no run could use the data or the model, or another process is at work in the folder.
            FetchError: If an embedded data set cannot be made here.
        """
        self.fetch()
        self.check()
        plan = self.plan
        if self.trials:
            tried = self._grid(self.trials, "tuning")
            best = tuning.choose(tried)
            for line in tuning.doubts(tried, best):
                self.console.print(f"note: {line}", highlight=False, markup=False)
            plan = tuning.tuned(plan, best)
        beside = self.beside(plan)
        ended = self._grid(plan.runs, "comparing")
        lost = [run for run, end in self._grid(beside, "baselines") if end.status != "finished"]
        found = results.collect(plan, ended, self.baseline, target or None)
        paths = [*results.write(found, self.root), *report.write(found, self.root)]
        return Compared(found, paths, len(found.failures) + len(lost), len(ended) + len(beside))

    def _grid(self, runs: list[CompareRun], title: str) -> list[tuple[CompareRun, Outcome]]:
        if not runs:
            return []
        at_once = min(self.at_once, len(runs))
        return run_grid(runs, self.root, workers=at_once, threads=self.threads, console=self.console, title=title)


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
