"""What the runs measured: their summary over seeds."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bora_fl.paths import write_atomically
from bora_fl.simulations.compare.intervals import Estimate, estimate, paired
from bora_fl.simulations.compare.plan import CompareRun, Plan, Variant
from bora_fl.simulations.compare.references import References, reference_runs, references, retention, share_of_central
from bora_fl.simulations.compare.rows import Row, rows_of
from bora_fl.simulations.grid import Outcome, is_finished


@dataclass(frozen=True)
class Summary:
    """A variant in a scenario over the seeds that ran to their end.

    Attributes:
        scenario: Name of the scenario.
        variant: Method and strategy.
        seeds: The seeds that finished.
        accuracy: After the last round, on the central test set.
        difference: Of that, paired by seed, from the baseline; of the clients' mean for personal strategies.
        loss: After the last round, on the central test set.
        loss_difference: Of that, paired by seed, from the baseline; None for personal strategies.
        client_accuracy: After the last round, mean over clients.
        client_accuracy_min: After the last round, the worst client.
        client_accuracy_sd: After the last round, spread over clients.
        merge_error: Mean over rounds.
        rank: After the last round.
        seconds: Of the whole run.
        server_seconds: Of all merges.
        megabytes: Up and down, 10⁶ bytes.
        target: The accuracy to reach: the user's, else the baseline's mean at the end, measured as `difference` is.
        megabytes_to_target: Up and down until the first evaluation at or above it, over the seeds that got there.
        reached: How many seeds got there.
        epsilon: The largest ε of any client in any seed; None without privacy.
        epsilon_unit: Whose presence is hidden.
        learning_rate: What the variant trained with.
        gain: Accuracy after the last round less that of round 0, paired by seed.
        retention: Accuracy as a share of the variant's own with the examples dealt at random, if that was run.
        of_central: How far the loss on the central test set fell, as a share of how far it fell in the central run.
        perplexity: After the last round, on the central test set.
        exact_match: Of responses generated after the last round.
        rouge_l: Likewise.
        effective_rank: Of the adapter's update after the last round.
    """

    scenario: str
    variant: Variant
    seeds: list[int]
    accuracy: Estimate | None
    difference: Estimate | None
    loss: Estimate | None
    loss_difference: Estimate | None
    client_accuracy: Estimate | None
    client_accuracy_min: Estimate | None
    client_accuracy_sd: Estimate | None
    merge_error: Estimate | None
    rank: Estimate | None
    seconds: Estimate | None
    server_seconds: Estimate | None
    megabytes: Estimate | None
    target: float | None
    megabytes_to_target: Estimate | None
    reached: int
    epsilon: float | None = None
    epsilon_unit: str = ""
    learning_rate: float | None = None
    gain: Estimate | None = None
    retention: Estimate | None = None
    of_central: Estimate | None = None
    perplexity: Estimate | None = None
    exact_match: Estimate | None = None
    rouge_l: Estimate | None = None
    effective_rank: Estimate | None = None


@dataclass(frozen=True)
class Results:
    """Everything a report is made of.

    Attributes:
        plan: What was to run.
        outcomes: Each run and how it ended.
        rows: Of the finished runs.
        summaries: Scenario by scenario, in the plan's order.
        baseline: What differences are from.
        references: Scenario to the accuracies that its own are read against.
    """

    plan: Plan
    outcomes: list[tuple[CompareRun, Outcome]]
    rows: list[Row]
    summaries: list[Summary]
    baseline: Variant
    references: dict[str, References] = field(default_factory=dict)

    def of(self, scenario: str) -> list[Summary]:
        """The summaries of a scenario."""
        return [summary for summary in self.summaries if summary.scenario == scenario]

    def curves(self, scenario: str, variant: Variant) -> list[list[Row]]:
        """The rows of a variant in a scenario, a list per seed."""
        seeds: dict[int, list[Row]] = {}
        for row in self.rows:
            if row.scenario == scenario and Variant(row.method, row.strategy) == variant:
                seeds.setdefault(row.seed, []).append(row)
        return list(seeds.values())

    @property
    def failures(self) -> list[tuple[CompareRun, str]]:
        """The runs without a result, with the reason."""
        return [(run, end.reason) for run, end in self.outcomes if end.status != "finished"]


def collect(
    plan: Plan, outcomes: list[tuple[CompareRun, Outcome]], baseline: Variant, target: float | None = None
) -> Results:
    """Read all runs and summarize them.

    Args:
        plan: The comparison.
        outcomes: Each run and how it ended.
        baseline: What differences are from.
        target: The accuracy that ``megabytes_to_target`` asks for; None is the baseline's own.
    """
    runs: dict[tuple[str, Variant], list[CompareRun]] = {}
    finished: dict[tuple[str, Variant], dict[int, list[Row]]] = {}
    for run, end in outcomes:
        if end.status == "finished":
            runs.setdefault((run.scenario, run.variant), []).append(run)
            finished.setdefault((run.scenario, run.variant), {})[run.seed] = rows_of(run)
    beside = reference_runs(plan, baseline)
    done = {run.folder: run for group in [*runs.values(), beside] for run in group if is_finished(run)}
    summaries: list[Summary] = []
    for scenario in plan.scenarios:
        reference = finished.get((scenario.name, baseline), {})
        for variant in plan.variants:
            if seeds := finished.get((scenario.name, variant)):
                found = _summarize(scenario.name, variant, seeds, reference, target)
                own = runs[scenario.name, variant]
                rate = own[0].settings.train.learning_rate
                against = {run.seed: run for run in runs.get((scenario.name, baseline), [])}
                shares = share_of_central(own, against, done)
                summaries.append(replace(found, learning_rate=rate, retention=retention(own, done), of_central=shares))
    rows = [row for seeds in finished.values() for one in seeds.values() for row in one]
    read_against = {row.name: references(runs.get((row.name, baseline), []), done) for row in plan.scenarios}
    return Results(plan, outcomes, rows, summaries, baseline, read_against)


def _summarize(
    scenario: str,
    variant: Variant,
    seeds: Mapping[int, Sequence[Row]],
    reference: Mapping[int, Sequence[Row]],
    target: float | None,
) -> Summary:
    def last(field: str) -> Estimate | None:
        return estimate(_last(seeds, field).values())

    # At the server, or at the clients if they keep some of the result.
    measure = "client_accuracy" if variant.personal else "accuracy"
    theirs = _last(reference, measure)
    if target is None and theirs:
        target = sum(theirs.values()) / len(theirs)
    errors = {seed: [r.merge_error for r in rows if r.merge_error is not None] for seed, rows in seeds.items()}
    spent = [
        next((r for r in rows if target is not None and (getattr(r, measure) or 0.0) >= target), None)
        for rows in seeds.values()
    ]
    to_target = [(row.bytes_up + row.bytes_down) / 1e6 for row in spent if row is not None]
    return Summary(
        scenario,
        variant,
        sorted(seeds),
        accuracy=last("accuracy"),
        difference=None if seeds is reference else paired(_last(seeds, measure), theirs),
        loss=last("loss"),
        loss_difference=None if seeds is reference else paired(_last(seeds, "loss"), _last(reference, "loss")),
        client_accuracy=last("client_accuracy"),
        client_accuracy_min=last("client_accuracy_min"),
        client_accuracy_sd=last("client_accuracy_sd"),
        merge_error=estimate([sum(e) / len(e) for e in errors.values() if e]),
        rank=last("rank"),
        seconds=last("seconds"),
        server_seconds=last("server_seconds"),
        megabytes=estimate([(rows[-1].bytes_up + rows[-1].bytes_down) / 1e6 for rows in seeds.values()]),
        target=target,
        megabytes_to_target=estimate(to_target),
        reached=len(to_target),
        gain=paired(_last(seeds, "accuracy"), _first(seeds)),
        epsilon=max(_last(seeds, "epsilon").values(), default=None),
        epsilon_unit=next((rows[-1].epsilon_unit for rows in seeds.values()), ""),
        perplexity=last("perplexity"),
        exact_match=last("exact_match"),
        rouge_l=last("rouge_l"),
        effective_rank=last("effective_rank"),
    )


def _last(seeds: Mapping[int, Sequence[Row]], field: str) -> dict[int, float]:
    """A field after the last round, by seed, where it was measured."""
    found = {seed: getattr(rows[-1], field) for seed, rows in seeds.items()}
    return {seed: float(value) for seed, value in found.items() if value is not None}


def _first(seeds: Mapping[int, Sequence[Row]]) -> dict[int, float]:
    """Accuracy of round 0, by seed, where it was measured."""
    found = {seed: rows[0] for seed, rows in seeds.items()}
    return {seed: row.accuracy for seed, row in found.items() if row.round == 0 and row.accuracy is not None}


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``results.csv`` (a line per round of each run) and ``results.json`` (summaries, runs, what is skipped).

    Returns:
        The two paths.
    """
    csv_path, json_path = folder / "results.csv", folder / "results.json"
    names = list(Row.__dataclass_fields__)
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(row) for row in results.rows)
    content = {
        "format": 2,
        "baseline": str(results.baseline),
        "scenarios": {row.name: row.summary for row in results.plan.scenarios},
        "references": {name: asdict(found) for name, found in results.references.items()},
        "summaries": [asdict(summary) for summary in results.summaries],
        "skipped": _skipped(results.plan.skipped.items()),
        "runs": [
            {
                "scenario": run.scenario,
                "method": run.variant.method,
                "strategy": run.variant.strategy,
                "seed": run.seed,
                "folder": str(run.folder.relative_to(run.root)),
                "status": end.status,
                "reason": end.reason,
                "seconds": end.seconds,
                "versions": end.versions,
                **run.identity,
            }
            for run, end in results.outcomes
        ],
    }
    write_atomically(json_path, json.dumps(content, indent=1) + "\n")
    return [csv_path, json_path]


def _skipped(items: Iterable[tuple[tuple[str, Variant], str]]) -> list[dict[str, str]]:
    return [{"scenario": scenario, "variant": str(variant), "reason": reason} for (scenario, variant), reason in items]
