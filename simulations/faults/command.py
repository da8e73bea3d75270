"""``bora-fl faults``: inject each fault into a federation, and say what became of the run.

What can be told from a reply alone is injected in process; what takes processes down is injected into a deployment over
loopback (`Deployment`), with TLS and authentication.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bora_fl.config import ConfigError

console = Console()


def faults(
    output: Annotated[
        Path, typer.Option(help="folder of the runs, their logs and results.json; run again to go on")
    ] = Path("runs/faults"),
    only: Annotated[str, typer.Option(help="comma-separated names, or a part of them; --list shows them")] = "",
    show: Annotated[bool, typer.Option("--list", help="list the faults and leave")] = False,
) -> None:
    """Inject faults into a federation and print what became of each run.

    Exits with 1 unless every adapter is right. A fault whose run ended right is not injected again in the same folder.
    """
    from bora_fl.paths import write_atomically
    from bora_fl.simulations.faults.catalogue import FAULTS, FaultRun
    from bora_fl.simulations.grid import outcome, run_grid

    if show:
        for name, fault in FAULTS.items():
            console.print(f"{name:22} {fault.summary} ({fault.where})", highlight=False)
        return
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    root = output.expanduser().resolve()
    chosen = [FaultRun(name, root) for name in FAULTS if not wanted or any(part in name for part in wanted)]
    if not chosen:
        raise ConfigError(f"--only {only}: no such fault; --list shows them")
    # One at a time: what is measured is how long a federation takes to recover on this machine.
    ended = run_grid(chosen, root, workers=1, threads=1, console=console, title="injecting")
    results = {
        name: {**end.result, "where": fault.where, "seconds": round(end.seconds or 0.0, 1)}
        for name, fault in FAULTS.items()
        if (end := outcome(FaultRun(name, root))).status == "finished"
    }
    write_atomically(root / "results.json", json.dumps(results, indent=1) + "\n")
    console.print(as_table(results))
    if not all(end.status == "finished" and run.stands(end.result) for run, end in ended):
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
