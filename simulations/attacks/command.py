"""``bora-fl attacks``: what each robust rule and each screening setting withstands."""

from collections.abc import Mapping
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
    "head.init": "random",  # attacked is what clients train
    "run.num-rounds": 5,
    "run.evaluate-every": 5,
    "run.threads": 1,
}

console = Console()


def attacks(
    output: Annotated[Path, typer.Option(help="folder of the runs and the table; run again to go on")] = Path(
        "runs/attacks"
    ),
    only: Annotated[str, typer.Option("--attacks", help="comma-separated; all by default")] = "",
    defences: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    clients: Annotated[int, typer.Option(help="clients")] = 8,
    attackers: Annotated[int, typer.Option(help="how many of them attack")] = 2,
    seeds: Annotated[int, typer.Option(help="number of seeds, from 0")] = 1,
    workers: Annotated[int, typer.Option(help="runs at once")] = 1,
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="key=value for all runs, may be given several times")
    ] = None,
) -> None:
    """Attack federations, and print a table of the accuracy that each defence is left with.

    A run that is finished is not run again.
    """
    from bora_fl.data import fetch
    from bora_fl.simulations.attacks.clients import ATTACKS
    from bora_fl.simulations.attacks.run import AttackRun
    from bora_fl.simulations.grid import run_grid

    if not 0 < attackers < clients:
        raise ConfigError(f"--attackers {attackers} of --clients {clients}: at least one, and not all of them")
    chosen = BASE | {"strategy.byzantine": attackers} | overrides(run_config)
    if parse(chosen).model.task != "classification":
        task = parse(chosen).model.task
        raise ConfigError(f"model.task = {task!r}: the attacks change a text's one class; use classification")
    if str(chosen.get("data.name", "embedded:")).startswith("embedded:"):
        fetch(str(chosen.get("data.name", "embedded:sentiment4")))
    root = output.expanduser().resolve()
    columns, rows = _chosen("--attacks", only, ATTACKS), _chosen("--defences", defences, DEFENCES)
    runs = [
        AttackRun(attack, defence, seed, clients, attackers, chosen | DEFENCES[defence], root)
        for defence in rows
        for attack in columns
        for seed in range(seeds)
    ]
    console.print(f"{len(runs)} runs, {workers} at once, in {root}", highlight=False, soft_wrap=True)
    ended = run_grid(runs, root, workers=workers, threads=1, console=console, title="attacking")
    results = {(run.attack, run.defence, run.seed): end.result for run, end in ended if end.status == "finished"}

    def mean(defence: str, attack: str, key: str = "accuracy") -> str:
        values = [results[attack, defence, seed][key] for seed in range(seeds) if (attack, defence, seed) in results]
        return f"{sum(values) / len(values):.3f}" if values else "-"

    table = Table(title=f"accuracy, {attackers} of {clients} clients attack", box=box.SIMPLE)
    backdoor = "backdoor" in columns
    for name in ("defence", *columns, *(["backdoor success"] if backdoor else [])):
        table.add_column(name)
    for defence in rows:
        success = [mean(defence, "backdoor", "backdoor")] if backdoor else []
        table.add_row(defence, *(mean(defence, attack) for attack in columns), *success)
    console.print(table)
    if len(results) < len(runs):
        raise typer.Exit(1)


def _chosen(option: str, text: str, known: Mapping[str, object]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {name!r}: choose from {', '.join(known)}")
    return names
