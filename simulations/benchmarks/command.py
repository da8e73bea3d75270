"""``bora-fl bench``: every benchmark by name."""

import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bora_fl.config import ConfigError
from bora_fl.paths import write_atomically

# Name to module, and what it measures. Each module has `main(arguments)`, and can be run with `python -m` too.
BENCHMARKS = {
    "layer": (
        "bora_fl.kernels.bench.layer",
        "one layer against its rivals, each checked against float64 first",
    ),
    "cost": ("bora_fl.kernels.bench.cost", "a model on paper of what the layer costs on a GPU; nothing is timed"),
    "gpu-check": (
        "bora_fl.kernels.gpu_check",
        "all that needs a GPU: the kernels' tests, then layer times",
    ),
    "merging": ("bora_fl.simulations.benchmarks.merging", "merging and refactorizing: planted optima, time, memory"),
    "step": ("bora_fl.simulations.benchmarks.step", "a training step against LoRA's, and several clients in one pass"),
    "language-step": ("bora_fl.simulations.benchmarks.language_step", "a step of a language model against LoRA's"),
    "server": ("bora_fl.simulations.benchmarks.server", "what a round costs the server, by the number of clients"),
    "wire": ("bora_fl.simulations.benchmarks.wire", "bytes a client and round by strategy, and codecs"),
    "codecs": ("bora_fl.simulations.benchmarks.codecs", "what codecs cost in accuracy, seed by seed; half an hour"),
    "simulation": ("bora_fl.simulations.benchmarks.simulation", "a simulation against a bare loop of its steps"),
    "worker": ("bora_fl.simulations.benchmarks.worker", "rounds over loopback with and without warm workers"),
    "closed-form-head": ("bora_fl.simulations.benchmarks.closed_form_head", "the solved head, no training"),
    "compression": ("bora_fl.simulations.benchmarks.compression", "what trained adapters lose as a LoRA of lower rank"),
    "private-step": ("bora_fl.simulations.benchmarks.private_step", "a DP-SGD step against a plain one and Opacus"),
}

APART = ("gpu-check", "compression")  # they need a GPU, or runs: `all` leaves them out

console = Console()


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="the benchmark, or all; its own options follow, such as --help")] = "",
    output: Annotated[Path, typer.Option(help="folder of bench.json, which `all` writes")] = Path("runs/bench"),
    show: Annotated[bool, typer.Option("--list", help="list the benchmarks and leave")] = False,
) -> None:
    """Run a benchmark on this machine and print its table."""
    if show or not name:
        table = Table("name", "what it measures", title="benchmarks")
        for row, (_, summary) in BENCHMARKS.items():
            table.add_row(row, summary)
        console.print(table)
        return
    if name == "all":
        raise typer.Exit(run_all((row for row in BENCHMARKS if row not in APART), output.expanduser()))
    if name not in BENCHMARKS:
        raise ConfigError(f"bench {name}: no such benchmark; use one of {', '.join(BENCHMARKS)}")
    code = importlib.import_module(BENCHMARKS[name][0]).main(context.args)
    raise typer.Exit(code or 0)


def run_all(names: Iterable[str], folder: Path) -> int:
    """Run benchmarks one after the other, each in a process of its own, below a line that says where.

    Args:
        names: Of benchmarks.
        folder: Where ``bench.json`` is written after each: the machine, and every benchmark's command, seconds, exit
            code and printed tables.

    Returns:
        0, or 1 if one failed; the others are run all the same.
    """
    packages = {package: version(package) for package in ("torch", "transformers", "peft", "flwr")}
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **packages,
    }
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    done: list[dict[str, object]] = []
    for name in names:
        console.rule(f"{name}: {BENCHMARKS[name][1]}")
        command = [sys.executable, "-m", "bora_fl.cli", "bench", name]
        began, lines = time.monotonic(), []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                lines.append(line)
                print(line, end="", flush=True)
        seconds = round(time.monotonic() - began, 1)
        row = {"name": name, "command": f"bora-fl bench {name}", "seconds": seconds, "exit_code": process.returncode}
        done.append(row | {"output": "".join(lines)})
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "bench.json", json.dumps({"machine": machine, "benchmarks": done}, indent=1) + "\n")
    console.print(f"written: {folder / 'bench.json'}", highlight=False)
    if failed := [str(row["name"]) for row in done if row["exit_code"]]:
        console.print(f"failed: {', '.join(failed)}")
    return int(bool(failed))
