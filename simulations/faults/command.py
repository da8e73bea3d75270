"""``bora-fl faults``: inflict each fault on a federation, and say what became of the run.

A run under a fault is right if its adapter equals that of an in-process simulation in which the same clients take part
in the same rounds. What can be told from a reply alone is inflicted in process; what takes processes down is inflicted
on a deployment over loopback (`Deployment`), with TLS and authentication.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bora_fl.config import ConfigError, Scalar
from bora_fl.report import read_rows

if TYPE_CHECKING:
    from torch import Tensor

SITES = 3
TOLERANCE = 1e-5  # of any entry of the adapter
# The default model and data, cut short: what is measured is how a run survives, not what it learns.
CONFIG: dict[str, Scalar] = {
    "data.max-train-examples": 600,
    "data.max-test-examples": 100,
    "model.max-length": 32,
    "train.local-steps": 3,
    "train.batch-size": 8,
    "run.num-rounds": 3,
    "run.evaluate-every": 3,
    "run.threads": 1,
}

console = Console()
log = logging.getLogger(__name__)


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
    """A fault, and how it is inflicted.

    Attributes:
        summary: In words.
        where: ``in process`` or ``loopback``.
        inflict: Runs a federation in a folder, with the fault, and judges it.
    """

    summary: str
    where: str
    inflict: Callable[[Path], Verdict]


def judge(folder: Path, config: Mapping[str, Scalar], outcome: str, seconds: float | None, lost: int) -> Verdict:
    """Compare a run's adapter with that of a simulation in which the same clients take part in the same rounds.

    Args:
        folder: The run's output folder.
        config: Its run config.
        outcome: In words.
        seconds: See `Verdict.seconds_to_recover`.
        lost: Rounds trained again; rounds without the faulty site are added.
    """
    rows = read_rows(folder / "metrics.jsonl")
    took_part = tuple((int(row["round"]), frozenset(int(client) for client in row["per_client"])) for row in rows)
    ours = _adapter(folder)
    theirs = _reference(took_part, tuple(sorted((k, v) for k, v in config.items() if not k.startswith("run.o"))))
    difference = max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())
    correct = ours.keys() == theirs.keys() and difference <= TOLERANCE and len(rows) == config["run.num-rounds"]
    without = sum(len(clients) < SITES for _, clients in took_part)
    return Verdict(outcome, correct, difference, seconds, lost + without)


@cache
def _reference(
    took_part: tuple[tuple[int, frozenset[int]], ...], config: tuple[tuple[str, Scalar], ...]
) -> "dict[str, Tensor]":
    from bora_fl.simulations.engine import simulate
    from bora_fl.simulations.faults.replies import only_of

    with tempfile.TemporaryDirectory() as folder:
        settings = dict(config) | {"run.output-dir": folder, "run.resume": False}
        simulate(settings, SITES, tamper=only_of(dict(took_part)))
        return _adapter(Path(folder))


def _adapter(folder: Path) -> "dict[str, Tensor]":
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(folder / "adapter" / "adapter_model.safetensors")
    return tensors


def catalogue() -> dict[str, Fault]:
    """Every fault by name."""
    from bora_fl.simulations.faults.processes import PROCESS_FAULTS
    from bora_fl.simulations.faults.replies import REPLY_FAULTS

    return REPLY_FAULTS | PROCESS_FAULTS


def faults(
    output: Annotated[Path, typer.Option(help="folder of the runs, their logs and results.json")] = Path("runs/faults"),
    only: Annotated[str, typer.Option(help="comma-separated names, or a part of them; --list shows them")] = "",
    show: Annotated[bool, typer.Option("--list", help="list the faults and leave")] = False,
) -> None:
    """Inflict faults on a federation and print what became of each run; exit 1 unless every adapter is right."""
    known = catalogue()
    if show:
        for name, fault in known.items():
            console.print(f"{name:22} {fault.summary} ({fault.where})", highlight=False)
        return
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    chosen = {name: fault for name, fault in known.items() if not wanted or any(part in name for part in wanted)}
    if not chosen:
        raise ConfigError(f"--only {only}: no such fault; --list shows them")
    results_path = output / "results.json"
    output.mkdir(parents=True, exist_ok=True)
    results = json.loads(results_path.read_text()) if results_path.is_file() else {}
    for number, (name, fault) in enumerate(chosen.items(), 1):
        folder = _fresh(output / name)
        console.print(f"[{number}/{len(chosen)}] {name}: {fault.summary} ...", highlight=False, markup=False)
        started = time.monotonic()
        verdict = _inflicted(fault, folder)
        results[name] = asdict(verdict) | {"where": fault.where, "seconds": round(time.monotonic() - started, 1)}
        results_path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(
            f"    {'right' if verdict.correct else 'WRONG'}: {verdict.outcome}", highlight=False, markup=False
        )
    ordered = {name: results[name] for name in known if name in results}
    console.print(as_table(ordered))
    if not all(results[name]["correct"] for name in chosen):
        raise typer.Exit(1)


def as_table(results: Mapping[str, Mapping[str, object]]) -> Table:
    """The table of faults."""
    table = Table("fault", "where", "outcome", "adapter", "recovery s", "rounds lost", title="faults")
    for name, row in results.items():
        seconds = row["seconds_to_recover"]
        recovery = "-" if seconds is None else f"{seconds:.0f}"
        adapter = "right" if row["correct"] else "WRONG"
        table.add_row(name, str(row["where"]), str(row["outcome"]), adapter, recovery, str(row["rounds_lost"]))
    return table


def _inflicted(fault: Fault, folder: Path) -> Verdict:
    try:
        return fault.inflict(folder)
    except Exception as error:  # one fault that brings the bench down must not hide the others
        log.debug("the fault could not be judged", exc_info=True)
        return Verdict(f"{type(error).__name__}: {error}", False, float("nan"), None, 0)


def _fresh(folder: Path) -> Path:
    number = 2
    base = folder
    while folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder
