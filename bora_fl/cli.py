"""The ``bora-fl`` command. What a command needs is imported when the command is called: help costs no library."""

import importlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

import bora_fl
from bora_fl.deployment.audit_log import audit_log

if TYPE_CHECKING:
    from bora_fl.config import Scalar

# Commands with modules of their own: where they are, and the first line of their help.
COMMANDS = {
    "compare": (
        "bora_fl.simulations.compare",
        "Compare strategies, and adapter methods, across non-IID scenarios and seeds.",
    ),
    "audit": (
        "bora_fl.simulations.audit",
        "Audit a privacy claim: a lower bound of epsilon from canaries in one training run.",
    ),
    "attacks": (
        "bora_fl.simulations.attacks",
        "Attack federations, and print a table of the accuracy that each defence is left with.",
    ),
    "faults": ("bora_fl.simulations.faults", "Inject faults into a federation and print what became of each run."),
    "bench": ("bora_fl.simulations.benchmarks", "Run a benchmark on this machine and print its table."),
    "worker": (
        "bora_fl.client.worker",
        "Serve a site's SuperNode with a model, data and kernels that stay loaded between rounds.",
    ),
    "doctor": (
        "bora_fl.deployment.doctor",
        "Look for what would make a run fail, before it starts; exit 1 if something would.",
    ),
}
# The options after a benchmark's name are the benchmark's.
CONTEXT = {"bench": {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}}
# The test set has 4,948 examples: evaluating it every round would cost as much as training.
DEMO: "dict[str, Scalar]" = {"strategy.min-nodes": 4, "run.evaluate-every": 4, "data.evaluation-fraction": 0.03}


class _Elsewhere(TyperCommand):
    """A command whose module is imported when it is called or asked for its own help."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        function = getattr(importlib.import_module(f"{COMMANDS[self.name][0]}.command"), self.name)
        app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
        app.command(self.name, context_settings=CONTEXT.get(self.name))(function)
        return typer.main.get_command(app).make_context(info_name, args, parent, **extra)


class _Commands(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (_, summary) in COMMANDS.items():
            self.add_command(_Elsewhere(name, help=summary))


cli = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning with BoRA adapters.",
)
certificates = typer.Typer(no_args_is_help=True, help="Make the certificates and keys of a federation over TLS.")
cli.add_typer(certificates, name="certificates")
cli.add_typer(audit_log, name="audit-log")
console = Console()

ConfigOption = Annotated[
    list[str] | None,
    typer.Option("--run-config", "-c", help="key=value, may be given several times; `bora-fl config` lists the keys"),
]


def main() -> None:
    """Run the command; a known mistake ends in one message and exit code 2, a failed run in exit code 1."""
    logging.captureWarnings(True)
    try:
        cli()
    except Exception as error:
        from bora_fl.config import ConfigError

        if isinstance(error, ConfigError):
            for line in str(error).splitlines():
                console.print(f"[bold red]error:[/] {escape(line)}", highlight=False)
            sys.exit(2)
        from bora_fl.data import FetchError
        from bora_fl.deployment.launch import LaunchError
        from bora_fl.server.checkpoint import CheckpointError

        if not isinstance(error, LaunchError | FetchError | CheckpointError):
            raise
        console.print(f"[bold red]failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"bora-fl {bora_fl.__version__}", highlight=False)
        raise typer.Exit


@cli.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Federated fine-tuning with BoRA adapters."""


@cli.command()
def config(
    word: Annotated[str, typer.Argument(help="a group, such as train, or a word of keys and meanings")] = "",
) -> None:
    """List run-config keys with their defaults and meanings: all, a group's, or those with a word in them."""
    from bora_fl.config import ConfigError, describe, suggest

    rows = describe(word)
    if not rows:
        raise ConfigError(f"config {word}: no such group, and no key or meaning has this word; {suggest(word)}")
    table = Table("key", "default", "meaning", title="run config")
    for key, default, meaning in rows:
        table.add_row(key, repr(default), meaning)
    console.print(table)


@cli.command()
def strategies() -> None:
    """List the aggregation strategies."""
    from bora_fl.strategies.presets import PRESETS

    table = Table("name", "what it does", title="strategies")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.summary)
    console.print(table)


@cli.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="embedded data sets; sentiment4 by default")] = None,
) -> None:
    """Get embedded data sets into the cache, so that later runs need no network."""
    from bora_fl.data import fetch as fetch_data

    for name in names or ["embedded:sentiment4"]:
        console.print(f"{name}: {fetch_data(name if ':' in name else f'embedded:{name}')}")


@cli.command()
def run(
    connection: Annotated[str | None, typer.Argument(help="SuperLink connection of Flower's config.toml")] = None,
    simulate: Annotated[int, typer.Option(help="simulate this many clients on this machine instead")] = 0,
    cpus: Annotated[int, typer.Option(help="cores per simulated client")] = 1,
    gpus: Annotated[float, typer.Option(help="share of a GPU per simulated client")] = 0.0,
    app: Annotated[Path, typer.Option(help="the Flower app")] = Path(),
    run_config: ConfigOption = None,
) -> None:
    """Run a federation with `flwr run`, follow it, and exit with a true exit code."""
    from bora_fl.config import overrides

    _launch(app, overrides(run_config), simulate, cpus, gpus, connection)


@cli.command()
def demo(
    output: Annotated[Path, typer.Option(help="output folder")] = Path("runs/demo"),
    app: Annotated[Path, typer.Option(help="the Flower app")] = Path(),
    run_config: ConfigOption = None,
) -> None:
    """Fine-tune MiniLM across four sentiment silos; about four minutes on two cores."""
    from bora_fl.config import overrides
    from bora_fl.data import fetch as fetch_data

    console.print("fetching the default data ...")
    fetch_data("embedded:sentiment4")
    if output.exists():
        number = 2
        while (fresh := output.with_name(f"{output.name}-{number}")).exists():
            number += 1
        output = fresh
    _launch(app, {**DEMO, "run.output-dir": str(output), **overrides(run_config)}, 4, 1, 0.0, None)


@cli.command()
def export(
    folder: Annotated[Path, typer.Argument(help="output folder of a run")],
    target: Annotated[Path, typer.Argument(help="folder to write")],
    form: Annotated[
        str, typer.Option("--as", help="merged: a plain model; lora: a LoRA adapter of rank b·r")
    ] = "merged",
) -> None:
    """Write a finished run as a merged model or as a LoRA adapter."""
    from bora_fl import export as exporting
    from bora_fl.config import ConfigError

    ways = {"merged": exporting.export_merged, "lora": exporting.export_lora}
    if form not in ways:
        raise ConfigError(f"--as {form}: use one of {', '.join(ways)}")
    console.print(f"wrote {ways[form](folder, target)}", highlight=False)


@certificates.command("server")
def server_certificates(
    host: Annotated[list[str], typer.Option(help="DNS name or IP address that the sites dial; may be given again")],
    into: Annotated[Path, typer.Option(help="folder to write")] = Path("certificates"),
    days: Annotated[int, typer.Option(help="how long they are valid", min=1)] = 365,
) -> None:
    """Make an authority, the server's certificate and its SuperExec secret; ca.crt goes to every site."""
    from bora_fl.deployment.certificates import make_server

    _list(make_server(into, host, days))


@certificates.command("site")
def site_keys(
    name: Annotated[str, typer.Argument(help="the site's name")],
    into: Annotated[Path, typer.Option(help="folder to write")] = Path("certificates"),
) -> None:
    """Make a site's key pair and its SuperExec secret; only NAME.key.pub leaves the site, for the server."""
    from bora_fl.deployment.certificates import make_site

    _list(make_site(into, name))


def _list(paths: list[Path]) -> None:
    for path in paths:
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def _show(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.file.flush()  # a pipe would hold the progress back


def _launch(
    app: Path, run_config: "dict[str, Scalar]", simulate: int, cpus: int, gpus: float, connection: str | None
) -> None:
    from bora_fl.deployment.launch import Simulation
    from bora_fl.deployment.launch import run as launch
    from bora_fl.report import rounds_table

    simulation = Simulation(simulate, cpus, gpus) if simulate else None
    outcome = launch(
        app.resolve(),
        run_config,
        simulation=simulation,
        connection=connection,
        show=_show,
    )
    if outcome.rows:
        console.print(rounds_table(outcome.rows, "rounds"))
        pictures = ("partition.png", "rounds.png")
        for name in ("adapter", "checkpoints", "metrics.jsonl", "config.json", *pictures, "run.log"):
            console.print(f"  {outcome.folder / name}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
