"""``bora-fl doctor``."""

import logging
import os
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.config import FEDERATION_FILE, ConfigError, overrides, read_federation
from bora_fl.deployment.doctor.examination import Role, Setup, connection, examine

console = Console()
_COLORS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    name: Annotated[str | None, typer.Argument(help="SuperLink connection of Flower's config.toml")] = None,
    role: Annotated[str, typer.Option(help="server, site or all")] = "all",
    superlink: Annotated[str, typer.Option(help="host:port that the sites dial")] = "",
    root_certificates: Annotated[Path | None, typer.Option(help="ca.crt")] = None,
    certificate: Annotated[Path | None, typer.Option(help="the server's certificate")] = None,
    key: Annotated[Path | None, typer.Option(help="its key")] = None,
    site_key: Annotated[Path | None, typer.Option(help="the SuperNode's private key")] = None,
    secret: Annotated[Path | None, typer.Option(help="the SuperExec's secret")] = None,
    database: Annotated[Path | None, typer.Option(help="the SuperLink's database")] = None,
    worker: Annotated[str, typer.Option(help="the site's worker, as unix:/run/bora-fl/worker.sock")] = "",
    worker_token_file: Annotated[Path | None, typer.Option(help="its token, if it listens on TCP")] = None,
    policy: Annotated[Path | None, typer.Option(help="the site's policy; BORA_FL_POLICY's by default")] = None,
    client_certificate: Annotated[Path | None, typer.Option(help="client.crt, for the server's proxy")] = None,
    client_key: Annotated[Path | None, typer.Option(help="its key")] = None,
    run_config: Annotated[list[str] | None, typer.Option("--run-config", "-c", help="key=value of the run")] = None,
) -> None:
    """Look for what would make a run fail, before it starts; exit 1 if something would.

    A federation.toml in the working folder says what is to run; what is given here wins.
    """
    if role not in get_args(Role):
        raise ConfigError(f"--role {role}: use one of {', '.join(get_args(Role))}")
    if name:
        home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
        known, authority = connection(name, home / "config.toml")
        superlink, root_certificates = superlink or known, root_certificates or authority
    if bool(client_certificate) != bool(client_key):
        raise ConfigError("--client-certificate and --client-key: give both or none")
    settings = read_federation(Path.cwd()).run_config
    if settings:
        console.print(f"the run is that of {FEDERATION_FILE}", highlight=False)
    chosen: Role = next(r for r in get_args(Role) if r == role)
    setup = Setup(
        chosen,
        {**settings, **overrides(run_config, settings)},
        superlink,
        root_certificates,
        certificate,
        key,
        site_key,
        secret,
        database,
        WorkerSettings(Address.read(worker), worker_token_file, wait=5.0) if worker else None,
        policy,
        (client_certificate, client_key) if client_certificate and client_key else None,
    )
    counts = {"pass": 0, "warn": 0, "fail": 0}
    logging.disable(logging.WARNING)  # what matters of it is in the findings
    try:
        for finding in examine(setup):
            counts[finding.level] += 1
            color = _COLORS[finding.level]
            console.print(f"[{color}]{finding.level}[/]  ", end="")
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            console.print(f"{finding.subject}: {finding.text}{remedy}", highlight=False, markup=False, soft_wrap=True)
    finally:
        logging.disable(logging.NOTSET)
    console.print(", ".join(f"{count} {level}" for level, count in counts.items()))
    if counts["fail"]:
        raise typer.Exit(1)
