"""What a comparison is read against: the zero-round floor, each client alone, data dealt at random, and central.

* **Zero rounds**: the server's model before round 1, which nothing was trained for; no run of its own.
* **Local only**: clients that train alone for as many rounds, their mean on the central test set.
* **IID federated**: the same federation with its examples dealt at random. A variant's *retention* is its accuracy as
  a share of its own there.
* **Central**: one client with all the data that takes as many steps as all clients of a round together.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bora_fl.config import DataSettings, Scalar, parse
from bora_fl.simulations.compare.intervals import Estimate, estimate
from bora_fl.simulations.compare.plan import CompareRun, Plan, Variant
from bora_fl.simulations.compare.rows import rows_of

BASELINES = ("local", "central", "iid")
MOST_LOCAL = 8  # clients that are trained alone, evenly spaced

_IID: dict[str, Scalar] = {
    "data.partition": "iid",
    "data.alpha": DataSettings().alpha,  # other scenarios' twins are the same run
    "data.classes-per-client": DataSettings().classes_per_client,
}
# What only several clients can keep to; under it one alone would not train.
_ALONE: dict[str, Scalar] = {
    "strategy.fraction-train": 1.0,
    "strategy.min-nodes": 1,
    "strategy.min-replies": 1,
    "strategy.robust": "none",
    "privacy.secure-aggregation": False,
}


@dataclass(frozen=True)
class References:
    """Accuracies on the central test set that a scenario's are read against, over seeds; None where not measured."""

    floor: Estimate | None = None
    local: Estimate | None = None
    iid: Estimate | None = None
    central: Estimate | None = None


def iid(run: CompareRun) -> CompareRun:
    """The run with its examples dealt at random, as the scenario of that name has it."""
    return replace(run, scenario="iid", settings=parse(run.settings.flat() | _IID))


def central(run: CompareRun) -> CompareRun:
    """One client with all the data, and the steps of all clients of a round."""
    settings = run.settings
    a_round = max(1, int(settings.strategy.fraction_train * run.num_clients + 0.5))
    own: dict[str, Scalar] = {"train.local-steps": settings.train.local_steps * a_round, "strategy.min-nodes": 0}
    flat = settings.flat() | _IID | _ALONE | own
    return replace(run, scenario="central", purpose="reference", num_clients=1, settings=parse(flat), node_configs={})


def local(run: CompareRun) -> list[CompareRun]:
    """A few of the clients, each in a federation of its own, at the rank that it has in the comparison's."""
    settings, count = parse(run.settings.flat() | _ALONE), min(run.num_clients, MOST_LOCAL)
    return [
        replace(
            run,
            purpose=f"local-{client}",
            num_clients=1,
            settings=settings,
            node_configs={
                0: {**run.node_configs.get(client, {}), "partition-id": client, "num-partitions": run.num_clients}
            },
        )
        for client in (number * run.num_clients // count for number in range(count))
    ]


def reference_runs(plan: Plan, variant: Variant, baselines: Collection[str] = BASELINES) -> list[CompareRun]:
    """All runs that the references need, each once: central and local of one variant, IID of all."""
    runs: dict[Path, CompareRun] = {}
    for run in plan.runs:
        wanted = [iid(run)] if "iid" in baselines and run.settings.data.partition != "iid" else []
        if run.variant == variant:
            wanted += [central(run)] if "central" in baselines else []
            wanted += local(run) if "local" in baselines else []
        runs |= {found.folder: found for found in wanted}
    return list(runs.values())


def retention(runs: Iterable[CompareRun], finished: Mapping[Path, CompareRun]) -> Estimate | None:
    """Accuracy over the accuracy with examples dealt at random, seed by seed."""
    shares = []
    for run in runs:
        ours, theirs = _accuracy(run, finished), _accuracy(iid(run), finished)
        if ours is not None and theirs:
            shares.append(ours / theirs)
    return estimate(shares)


def share_of_central(
    runs: Iterable[CompareRun], baselines: Mapping[int, CompareRun], finished: Mapping[Path, CompareRun]
) -> Estimate | None:
    """How far the test loss fell since round 0, as a share of how far it fell in the central run, seed by seed.

    Args:
        runs: Of a variant in a scenario.
        baselines: Seed to the baseline's run there, whose central run is the measure.
        finished: Folder to run, of all that are finished.
    """
    shares = []
    for run in runs:
        if run.seed not in baselines:
            continue
        ours, theirs = _fall(run, finished), _fall(central(baselines[run.seed]), finished)
        if ours is not None and theirs is not None and theirs > 0:
            shares.append(ours / theirs)
    return estimate(shares)


def references(runs: list[CompareRun], finished: Mapping[Path, CompareRun]) -> References:
    """What the runs of one variant in one scenario are read against.

    Args:
        runs: Of the variant, a seed each.
        finished: Folder to run, of all that are finished, the references' among them.
    """

    def over(kinds: list[list[CompareRun]]) -> Estimate | None:
        means = []
        for kind in kinds:
            found = [a for run in kind if (a := _accuracy(run, finished)) is not None]
            means += [sum(found) / len(found)] if found else []
        return estimate(means)

    zero = [rows_of(run)[0] for run in runs if run.folder in finished]
    return References(
        floor=estimate([row.accuracy for row in zero if row.round == 0 and row.accuracy is not None]),
        local=over([local(run) for run in runs]),
        iid=over([[iid(run)] for run in runs]),
        central=over([[central(run)] for run in runs]),
    )


def _fall(run: CompareRun, finished: Mapping[Path, CompareRun]) -> float | None:
    if run.folder not in finished:
        return None
    first, last = rows_of(run)[0].loss, rows_of(run)[-1].loss
    return None if first is None or last is None else first - last


def _accuracy(run: CompareRun, finished: Mapping[Path, CompareRun]) -> float | None:
    if run.folder not in finished:
        return None
    return rows_of(run)[-1].accuracy
