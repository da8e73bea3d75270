"""Faults, and how a run under a fault is judged.

A run under a fault is right if its adapter equals that of an in-process simulation in which the same clients take part
in the same rounds.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from bora_fl.config import Scalar
from bora_fl.report import training_rows
from bora_fl.simulations.engine import only_of, simulate

SITES = 3
ROUND = 2  # in which the faults are injected
TOLERANCE = 1e-5  # of any entry of the adapter
# The default model and data, cut short: what is measured is how a run survives, not what it learns.
CONFIG: dict[str, Scalar] = {
    "data.max-train-examples": 600,
    "data.max-test-examples": 100,
    "model.max-length": 32,
    "train.local-steps": 3,
    "train.batch-size": 8,
    "head.init": "random",  # so that a reference needs no more than who took part in which round
    "run.num-rounds": 3,
    "run.evaluate-every": 3,
    "run.threads": 1,
}


@dataclass(frozen=True)
class Verdict:
    """What became of a run.

    Attributes:
        outcome: In words.
        correct: The adapter equals the reference.
        difference: The largest difference of any entry to it.
        seconds_to_recover: From the fault to the end of the next round; None where no time was lost.
        rounds_lost: Rounds that were trained again, or merged without the faulty site.
    """

    outcome: str
    correct: bool
    difference: float
    seconds_to_recover: float | None
    rounds_lost: int


@dataclass(frozen=True)
class Fault:
    """A fault, and how it is injected.

    Attributes:
        summary: In words.
        where: ``in process`` or ``loopback``.
        inject: Runs a federation in a folder, with the fault, and judges it.
    """

    summary: str
    where: str
    inject: Callable[[Path], Verdict]


def judge(
    folder: Path,
    config: Mapping[str, Scalar],
    outcome: str,
    seconds: float | None,
    lost: int,
    sites: int = SITES,
    sampled: int | None = None,
) -> Verdict:
    """Compare a run's adapter with that of a simulation in which the same clients take part in the same rounds.

    Args:
        folder: The run's output folder.
        config: Its run config.
        outcome: In words.
        seconds: See `Verdict.seconds_to_recover`.
        lost: Rounds trained again; rounds without the faulty site are added.
        sites: How many there are.
        sampled: How many are asked each round; all by default.
    """
    rows = training_rows(folder / "metrics.jsonl")
    took_part = tuple((int(row["round"]), frozenset(int(client) for client in row["per_client"])) for row in rows)
    ours = _adapter(folder)
    theirs = _reference(sites, took_part, tuple(sorted((k, v) for k, v in config.items() if not k.startswith("run.o"))))
    difference = max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())
    correct = ours.keys() == theirs.keys() and difference <= TOLERANCE and len(rows) == config["run.num-rounds"]
    without = sum(len(clients) < (sampled or sites) for _, clients in took_part)
    return Verdict(outcome, correct, difference, seconds, lost + without)


@cache
def _reference(
    sites: int, took_part: tuple[tuple[int, frozenset[int]], ...], config: tuple[tuple[str, Scalar], ...]
) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(config) | {"run.output-dir": folder, "run.resume": False}
        simulate(settings, sites, tamper=only_of(dict(took_part)))
        return _adapter(Path(folder))


def _adapter(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "adapter" / "adapter_model.safetensors")
    return tensors
