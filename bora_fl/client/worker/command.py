"""``bora-fl worker``: the site's warm worker, and its status."""

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.config import ConfigError, extensions, overrides, parse
from bora_fl.granted import num_cores
from bora_fl.paths import state_folder
from bora_fl.tracking.prometheus import serving

console = Console()


def worker(
    listen: Annotated[
        str, typer.Option(help="unix:/path/to/worker.sock or tcp:127.0.0.1:PORT; empty is a socket in the state folder")
    ] = "",
    token_file: Annotated[
        Path | None, typer.Option(help="token of a tcp address; written, readable by its owner alone, if missing")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="the site's policy; wins over the node config's. `bora-fl init site` writes one")
    ] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option("--run-config", "-c", help="key=value of the coming run: load its model before round 1"),
    ] = None,
    warm_up: Annotated[bool, typer.Option("--warm-up", help="the same, for the default run config")] = False,
    partition: Annotated[
        str, typer.Option(help="ID/N, such as 0/3: tokenize that partition's data in the warm-up too")
    ] = "",
    processes: Annotated[
        int, typer.Option(help="processes that train each client together, a GPU each where there are as many", min=1)
    ] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="with --processes: each process holds a part of the base model's weights")
    ] = False,
    metrics_port: Annotated[
        int, typer.Option(help="show Prometheus metrics on this port of 127.0.0.1; 0 is off", min=0, max=65535)
    ] = 0,
    grace: Annotated[float, typer.Option(help="seconds the job at work has to finish on SIGTERM")] = 30.0,
    show_status: Annotated[bool, typer.Option("--status", help="show a running worker's status and stop")] = False,
) -> None:
    """Serve a site's SuperNode with a model, data and kernels that stay loaded between rounds.

    Run it beside the SuperNode, as the same user and in the same folder, and tell the SuperNode where it listens:

    flower-supernode ... --node-config 'partition-id=0 num-partitions=3 worker="unix:/run/bora-fl/worker.sock"'

    The ClientApps of that SuperNode then hand their work over; without `worker` they train in their own process.
    A tcp address takes worker-token-file="..." beside it. SIGTERM and Ctrl-C end the worker.
    """
    address = Address.read(listen) if listen else Address(path=default_socket())
    settings = WorkerSettings(address, token_file, wait=2.0)
    if show_status:
        _show_status(settings)
        return
    extensions.take_installed_only()  # the code that runs here is the site's
    chosen = overrides(run_config)
    which = _partition(partition)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", force=True)
    if shard and processes == 1:
        raise ConfigError(
            "--shard: one process has nobody to share the base model out with; give --processes 2 or more"
        )
    if policy:
        from bora_fl.privacy.policy import read_policy

        read_policy(policy)  # a mistake ends here, not in round 1
    if processes > 1:  # before torch is imported, which reads it then; inherited by the others
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // processes)))
    from bora_fl.client.worker.servicer import SiteWorker
    from bora_fl.client.worker.serving import serve

    run = (parse(chosen), which) if chosen or warm_up or which else None
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    site = SiteWorker(policy.absolute() if policy else None, processes, shard)
    with serving(metrics_port, site.numbers, "--metrics-port"):
        serve(settings, site, stop=stop, grace=grace, warm_up=run)


def default_socket() -> Path:
    """``$BORA_FL_STATE/worker/worker.sock``, else under ``~/.local/state/bora_fl``."""
    return state_folder().absolute() / "worker" / "worker.sock"


def _partition(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    which, slash, count = text.partition("/")
    if not (slash and which.isdigit() and count.isdigit() and int(which) < int(count)):
        raise ConfigError(f"--partition {text!r}: write ID/N, such as 0/3, with IDs from 0")
    return int(which), int(count)


def _show_status(settings: WorkerSettings) -> None:
    from bora_fl.client.worker.stub import WorkerError, status

    try:
        found = status(settings)
    except WorkerError as error:
        console.print(f"[bold red]failed:[/] {error}", highlight=False)
        sys.exit(1)
    table = Table(show_header=False, title=f"site worker at {settings.address}")
    rows = {
        "version": found.version,
        "pid": found.pid,
        "up": f"{found.uptime_seconds:.0f} s",
        "base models loaded": found.base_loads,
        "splits tokenized": found.data_loads,
        "rounds trained": found.trained,
        "evaluations": found.evaluated,
        "refused": found.refused,
        "cancelled": found.cancelled,
        "waiting": found.waiting,
        "at work on": found.current or "nothing",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)
