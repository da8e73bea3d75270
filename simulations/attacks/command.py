"""``bora-fl attacks``: what each robust rule and each screening setting withstands."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bora_fl.config import ConfigError, Scalar, overrides, parse

DEFENCES: Mapping[str, dict[str, Scalar]] = {
    "none": {},
    "median": {"strategy.robust": "median"},
    "trimmed-mean": {"strategy.robust": "trimmed-mean"},
    "krum": {"strategy.robust": "krum"},
    "multi-krum": {"strategy.robust": "multi-krum"},
    "norm-clip": {"strategy.robust": "norm-clip"},
    "min-cosine": {"strategy.min-cosine": 0.0},
    "max-loss-increase": {"strategy.max-loss-increase": 0.1, "strategy.screening-examples": 200},
}
BASE: dict[str, Scalar] = {
    "model.max-length": 24,
    "data.partition": "dirichlet",
    "data.alpha": 1.0,
    "data.max-train-examples": 4000,
    "data.max-test-examples": 1000,
    "data.evaluation-fraction": 0.0,
    "train.local-steps": 6,
    "train.learning-rate": 4e-3,
    "train.head-learning-rate": 2e-2,
    "train.schedule": "constant",
    "strategy.evaluate-in-train": False,
    "run.num-rounds": 5,
    "run.evaluate-every": 5,
    "run.threads": 1,
}

console = Console()


@dataclass(frozen=True)
class Trial:
    """One federation: an attack, a defence, a seed."""

    attack: str
    defence: str
    seed: int
    clients: int
    attackers: int
    config: dict[str, Scalar]
    root: Path

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return self.root / f"{self.attack}-{self.defence}-{self.seed}"

    @property
    def result(self) -> Path:
        """Its outcome, once it has ended."""
        return self.folder / "outcome.json"

    def identity(self) -> dict[str, object]:
        """What decides the outcome."""
        return {"config": self.config, "clients": self.clients, "attackers": self.attackers}


def run_trial(trial: Trial) -> str:
    """Run a trial in this process; returns why it failed, or an empty string."""
    import shutil

    from bora_fl.report import read_rows
    from bora_fl.simulations.attacks.clients import ATTACKS, attacked
    from bora_fl.simulations.engine import simulate

    shutil.rmtree(trial.folder, ignore_errors=True)
    own: dict[str, Scalar] = {"run.seed": trial.seed, "run.output-dir": str(trial.folder)}
    app = attacked(ATTACKS[trial.attack], frozenset(range(trial.attackers)))
    try:
        folder = simulate(trial.config | own, trial.clients, app=app)
        rows = read_rows(folder / "metrics.jsonl")
        outcome = {
            "identity": trial.identity(),
            "accuracy": rows[-1]["accuracy"],
            "backdoor": _backdoor_success(trial.config | own, folder) if trial.attack in ("none", "backdoor") else None,
            "rejected": sum(int(str(row["rejected"])) for row in rows),
        }
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(folder / name, ignore_errors=True)
        trial.result.write_text(json.dumps(outcome, indent=1) + "\n")
    except Exception as error:  # the other trials go on, and the table says it
        return f"{type(error).__name__}: {error}"
    return ""


def _backdoor_success(config: dict[str, Scalar], folder: Path) -> float:
    """Share of the test examples of other classes that the trigger turns into the target class."""
    from peft import PeftModel

    from bora_fl.data import load_dataset, test_data
    from bora_fl.evaluate import evaluate
    from bora_fl.models import load_base, load_tokenizer
    from bora_fl.simulations.attacks.clients import triggered

    settings = parse(config)
    test = test_data(settings.data, settings.model, load_tokenizer(settings.model))
    assert test is not None
    base = load_base(settings.model, load_dataset(settings.data).label_names, settings.run.seed)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    return evaluate(model, triggered(test), settings.train.evaluation_batch_size).accuracy


def attacks(
    output: Annotated[Path, typer.Option(help="folder of the trials and the table; run again to go on")] = Path(
        "runs/attacks"
    ),
    only: Annotated[str, typer.Option("--attacks", help="comma-separated; all by default")] = "",
    defences: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    clients: Annotated[int, typer.Option(help="clients")] = 8,
    attackers: Annotated[int, typer.Option(help="how many of them attack")] = 2,
    seeds: Annotated[int, typer.Option(help="number of seeds, from 0")] = 1,
    workers: Annotated[int, typer.Option(help="trials at once")] = 1,
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="key=value for all trials, several times")
    ] = None,
) -> None:
    """Attack federations, and print a table of the accuracy that each defence is left with.

    A trial that has ended is not run again.
    """
    from bora_fl.data import fetch
    from bora_fl.simulations.attacks.clients import ATTACKS
    from bora_fl.simulations.compare.sweep import environment
    from bora_fl.simulations.pool import run_all

    if not 0 < attackers < clients:
        raise ConfigError(f"--attackers {attackers} of --clients {clients}: at least one, and not all of them")
    chosen = BASE | {"strategy.byzantine": attackers} | overrides(run_config)
    if parse(chosen).model.task != "classification":
        raise ConfigError("model.task = 'causal-lm': the attacks change class labels; use classification")
    if str(chosen.get("data.name", "embedded:")).startswith("embedded:"):
        fetch(str(chosen.get("data.name", "embedded:sentiment4")))
    trials = [
        Trial(attack, defence, seed, clients, attackers, chosen | DEFENCES[defence], output.resolve())
        for defence in _chosen("--defences", defences, DEFENCES)
        for attack in _chosen("--attacks", only, ATTACKS)
        for seed in range(seeds)
    ]
    todo = [trial for trial in trials if _read(trial).get("identity") != trial.identity()]
    console.print(f"{len(todo)} of {len(trials)} trials to run in {output.resolve()}", highlight=False)
    failed: list[str] = []

    def on_done(trial: Trial, reason: str) -> None:
        if reason:
            failed.append(reason)
        accuracy = _read(trial).get("accuracy", reason)
        console.print(f"{trial.attack} against {trial.defence}, seed {trial.seed}: {accuracy}", highlight=False)

    run_all(todo, run_trial, workers, environment=environment(1), on_done=on_done)
    table = Table(title=f"accuracy, {attackers} of {clients} clients attack", box=box.SIMPLE)
    columns = list(dict.fromkeys(trial.attack for trial in trials))
    for name in ("defence", *columns, *(["backdoor success"] if "backdoor" in columns else [])):
        table.add_column(name)
    for defence in dict.fromkeys(trial.defence for trial in trials):
        row = [t for t in trials if t.defence == defence]
        cells = [_mean([_read(t).get("accuracy") for t in row if t.attack == name]) for name in columns]
        if "backdoor" in columns:
            cells.append(_mean([_read(t).get("backdoor") for t in row if t.attack == "backdoor"]))
        table.add_row(defence, *cells)
    console.print(table)
    if failed:
        raise typer.Exit(1)


def _chosen(option: str, text: str, known: Mapping[str, object]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {name!r}: choose from {', '.join(known)}")
    return names


def _read(trial: Trial) -> dict[str, object]:
    return json.loads(trial.result.read_text()) if trial.result.is_file() else {}


def _mean(values: list[object]) -> str:
    numbers = [float(str(value)) for value in values if value is not None]
    return f"{sum(numbers) / len(numbers):.3f}" if numbers else "-"
