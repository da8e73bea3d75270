"""How long a comparison takes: from its own finished runs, or from two rounds of its first run."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from bora_fl.config import Scalar, parse
from bora_fl.paths import state_in
from bora_fl.report import read_rows
from bora_fl.simulations import grid
from bora_fl.simulations.compare.plan import CompareRun
from bora_fl.simulations.engine import simulate


def seconds_left(runs: Sequence[CompareRun], workers: int) -> float:
    """An estimate of the wall clock of what is not finished.

    It scales with the client steps of a run. The scale is that of the finished runs or, without any, of two rounds of
    the first run, which this call then trains in this process.
    """
    ends = [(run, grid.outcome(run)) for run in runs]
    todo = [run for run, _ in ends if not grid.is_finished(run)]
    known = [(end.seconds, run.cost) for run, end in ends if end.status == "finished" and end.seconds]
    if not todo:
        return 0.0
    if known:
        fixed, scale = 0.0, sum(seconds for seconds, _ in known) / sum(cost for _, cost in known)
    else:
        fixed, scale = _two_rounds(todo[0])
    return sum(fixed + scale * run.cost for run in todo) / max(workers, 1)


def _two_rounds(run: CompareRun) -> tuple[float, float]:
    """Seconds of a run beside its training, and for each client step; the second round is evaluated, the first not."""
    settings = run.settings
    with tempfile.TemporaryDirectory() as folder, state_in(Path(folder) / "state"):
        own: dict[str, Scalar] = {
            "run.output-dir": f"{folder}/run",
            "run.num-rounds": 2,
            "run.evaluate-every": 2,
            "run.keep-best": False,
            "run.patience": 0,  # it needs keep-best
            "run.restart-margin": 0.0,
            "head.solve-again": "never",
            "privacy.ledger-dir": f"{folder}/ledger",
        }
        output = simulate(parse(settings.flat() | own), run.num_clients, node_configs=run.node_configs)
        before, trained, evaluated = (row["seconds"] for row in read_rows(output / "metrics.jsonl"))
    rounds = settings.run.num_rounds
    evaluations = sum(settings.run.evaluates(number) for number in range(1, rounds + 1))
    again = sum(
        settings.solves_head and settings.head.solves_after(number, last=number == rounds)
        for number in range(1, rounds + 1)
    )
    return before * (1 + again) + max(evaluated - trained, 0.0) * evaluations, trained * rounds / run.cost


def in_words(seconds: float) -> str:
    """``3 h 20 min``; minutes below an hour."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
