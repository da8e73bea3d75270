"""The ``bora-fl`` command. What a command needs is imported when the command is called: help costs no library."""

import contextlib
import importlib
import json
import logging
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

import bora_fl
from bora_fl.deployment.audit_log import audit_log
from bora_fl.deployment.certificate_commands import certificates
from bora_fl.deployment.init import init
from bora_fl.quiet import quiet

if TYPE_CHECKING:
    from bora_fl.config import Scalar
    from bora_fl.deployment.progress import JsonProgress, Watcher
    from bora_fl.simulations.launch import Simulation

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
    "predict": (
        "bora_fl.predicting",
        "Predict with a finished run: each text's label or labels, a number, its words' labels, or a response.",
    ),
    "evaluate": (
        "bora_fl.evaluating",
        "Evaluate a finished run's language model on tasks of lm-evaluation-harness.",
    ),
    "export": ("bora_fl.exporting", "Write a finished run as a merged model, as a GGUF file or as a LoRA adapter."),
    "push": ("bora_fl.hub", "Upload a finished run's adapter, or an exported folder, to the Hugging Face Hub."),
    "ui": (
        "bora_fl.page",
        "Write a page of a run or a comparison: one HTML file with curves, clients, privacy, settings; no network.",
    ),
    "chat": ("bora_fl.chat", "Talk to the language model of a finished run."),
    "bench": ("bora_fl.simulations.benchmarks", "Run a benchmark on this machine and print its table."),
    "plan": ("bora_fl.planning", "Say what a language model's run takes, and which settings fit a GPU."),
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
cli.add_typer(certificates, name="certificates")
cli.add_typer(audit_log, name="audit-log")
cli.add_typer(init, name="init")
console = Console()

ConnectionArgument = Annotated[str | None, typer.Argument(help="SuperLink connection of Flower's config.toml")]
ConfigOption = Annotated[
    list[str] | None,
    typer.Option("--run-config", "-c", help="key=value, may be given several times; `bora-fl config` lists the keys"),
]


def main() -> None:
    """Run the command; a known mistake ends in one message and exit code 2, a failed run in exit code 1."""
    logging.captureWarnings(True)
    quiet()
    try:
        cli()
    except Exception as error:
        if not (found := _mistake(error)):
            raise
        word, message, code = found
        for line in message.splitlines() if code == 2 else [message]:
            console.print(f"[bold red]{word}:[/] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(code)


def _mistake(error: Exception) -> tuple[str, str, int] | None:
    """What a known mistake is called, its message, and the exit code it ends in; None for any other exception."""
    from bora_fl.config import ConfigError, extras

    if isinstance(error, ConfigError):
        return "error", str(error), 2
    if isinstance(error, ImportError):
        return ("error", message, 2) if (message := extras.explain(error)) else None
    from bora_fl.data import FetchError
    from bora_fl.deployment.launch import LaunchError
    from bora_fl.server.checkpoint import CheckpointError
    from bora_fl.strategies.observer import RunFailedError

    known = isinstance(error, LaunchError | FetchError | CheckpointError | RunFailedError)
    return ("failed", str(error), 1) if known else None


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
    """List the aggregation strategies, installed packages' own among them."""
    from bora_fl.strategies.catalogue import find, names

    table = Table("name", "what it does", title="strategies")
    for name in names():
        table.add_row(name, find(name).summary)
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
    connection: ConnectionArgument = None,
    simulate: Annotated[int, typer.Option(help="simulate this many clients on this machine instead", min=0)] = 0,
    cpus: Annotated[int, typer.Option(help="cores per simulated client")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs per simulated client, or a share of one")] = 0.0,
    backend: Annotated[
        str, typer.Option(help="processes, or ray (the default where RAY_ADDRESS names a cluster)", show_default=False)
    ] = "",
    app: Annotated[Path, typer.Option(help="the Flower app")] = Path(),
    attach: Annotated[int, typer.Option(help="follow this run to its end instead of starting one")] = 0,
    on_interrupt: Annotated[
        str, typer.Option(help="what Ctrl-C or SIGTERM does with a deployment's run: ask (in a terminal), leave, stop")
    ] = "ask",
    as_json: Annotated[
        bool, typer.Option("--json", help="for programs: JSON lines in the place of text, the last says how it ended")
    ] = False,
    run_config: ConfigOption = None,
) -> None:
    """Run a federation, follow it, and exit with a true exit code.

    A federation.toml in the working folder, such as `bora-fl init` writes, says what to run; what is given here wins.
    """
    try:
        _run(connection, simulate, cpus, gpus, backend, app, attach, on_interrupt, as_json, run_config)
    except Exception as error:
        if not as_json or not (known := _mistake(error)):
            raise
        _json().emit("failed", message=known[1], exit_code=known[2])
        sys.exit(known[2])


def _run(
    connection: str | None,
    simulate: int,
    cpus: int,
    gpus: float,
    backend: str,
    app: Path,
    attach: int,
    on_interrupt: str,
    as_json: bool,
    run_config: list[str] | None,
) -> None:
    from bora_fl.config import ConfigError, overrides, read_federation

    if on_interrupt not in ("ask", "leave", "stop"):
        raise ConfigError(f"--on-interrupt {on_interrupt}: use one of ask, leave, stop")
    if simulate and (connection or attach):
        raise ConfigError("--simulate runs on this machine; leave out the connection and --attach")
    from bora_fl.deployment import launch

    if attach and run_config:
        raise ConfigError(
            f"--run-config {run_config[0]!r} with --attach {attach}: the run has its settings; leave it out"
        )
    simulated = [name for name, given in (("--cpus", cpus != 1), ("--gpus", gpus), ("--backend", backend)) if given]
    if attach and simulated:
        raise ConfigError(f"{', '.join(simulated)} with --attach {attach}: they are for --simulate; leave them out")
    if attach:
        with _watching(as_json) as show:
            ending = partial(_stops, show, connection or "", on_interrupt)
            log = launch.attach(str(attach), connection or "", stops=ending, show=show).log
        _completed(log, as_json)
        return
    federation = read_federation(Path.cwd())
    settings = {**federation.run_config, **overrides(run_config, federation.run_config)}
    where = connection or ("" if simulate else federation.connection)
    if where and simulated:
        raise ConfigError(f"{', '.join(simulated)} with connection {where!r}: they are for --simulate; leave them out")
    if where:
        with _watching(as_json) as show:
            ending = partial(_stops, show, where, on_interrupt)
            log = launch.run(app.resolve(), settings, where, stops=ending, show=show).log
        _completed(log, as_json)
    elif clients := simulate or federation.simulate:
        from bora_fl.simulations.launch import Simulation

        _simulate(app, settings, Simulation(clients, cpus, gpus, backend), as_json)
    else:
        raise ConfigError(
            "nothing to run: name a SuperLink connection of Flower's config.toml, give --simulate, or write a "
            "federation.toml with `bora-fl init`"
        )


@cli.command()
def stop(
    run_id: Annotated[int, typer.Argument(help="the run's id, which `bora-fl run` and `flwr ls` say")],
    connection: ConnectionArgument = None,
) -> None:
    """Stop a run on a deployment; with run.resume=true it can go on after its last finished round."""
    from bora_fl.deployment import launch

    launch.stop(str(run_id), connection or "")
    _show(f"run {run_id} is stopped")


@cli.command()
def demo(
    output: Annotated[Path, typer.Option(help="output folder")] = Path("runs/demo"),
    app: Annotated[Path, typer.Option(help="the Flower app")] = Path(),
    run_config: ConfigOption = None,
) -> None:
    """Fine-tune MiniLM across four sentiment silos; about five minutes on two cores."""
    from bora_fl.config import overrides
    from bora_fl.data import fetch as fetch_data
    from bora_fl.simulations.launch import Simulation

    console.print("fetching the default data ...")
    fetch_data("embedded:sentiment4")
    given = overrides(run_config)
    if output.exists() and not given.get("run.resume"):
        number = 2
        while (fresh := output.with_name(f"{output.name}-{number}")).exists():
            number += 1
        output = fresh
    _simulate(app, {**DEMO, "run.output-dir": str(output), **given}, Simulation(4))


def _show(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.file.flush()  # a pipe would hold the progress back


def _json(folder: Path | None = None) -> "JsonProgress":
    from bora_fl.deployment.progress import JsonProgress

    return JsonProgress(_show, folder)


def _watching(as_json: bool, folder: Path | None = None) -> "contextlib.AbstractContextManager[Watcher]":
    """Who shows a run: JSON lines, a live view in a terminal, lines elsewhere."""
    from bora_fl.deployment.progress import Lines, LiveView

    if as_json:
        return contextlib.nullcontext(_json(folder))
    draws = console.is_terminal and not console.is_dumb_terminal
    return LiveView(console, folder) if draws else Lines(_show)


def _completed(log: Path, as_json: bool) -> None:
    if as_json:
        _json().emit("completed", log=str(log))
    else:
        _show(f"completed; its log: {log}")


def _simulate(app: Path, run_config: "dict[str, Scalar]", simulation: "Simulation", as_json: bool = False) -> None:
    from bora_fl.report import rounds_table
    from bora_fl.simulations.launch import output_folder
    from bora_fl.simulations.launch import run as run_simulation

    with _watching(as_json, output_folder(app.resolve(), run_config)) as show:
        outcome = run_simulation(app.resolve(), run_config, simulation, show=show)
    if as_json:
        _json().emit("completed", log=str(outcome.log), folder=str(outcome.folder))
        return
    console.print(rounds_table(outcome.rows, "rounds"))
    pictures = ("partition.png", "rounds.png")
    for name in ("adapter", "checkpoints", "metrics.jsonl", "config.json", *pictures, "run.log"):
        if outcome.folder and (outcome.folder / name).exists():
            console.print(f"  {outcome.folder}/{name}", highlight=False, soft_wrap=True)
    for command, what in _next_commands(outcome.folder).items():
        console.print(f"{what}: {command}", highlight=False, soft_wrap=True)


def _next_commands(folder: Path | None) -> dict[str, str]:
    """What may be done with a finished run, by command."""
    if not folder or not (folder / "config.json").is_file() or not (folder / "adapter").is_dir():
        return {}
    name = shlex.quote(os.path.relpath(folder))
    found = {f"bora-fl predict {name} FILE": "answers for a file", f"bora-fl ui {name}": "its page"}
    if json.loads((folder / "config.json").read_text()).get("model.task") == "causal-lm":
        found = {f"bora-fl chat {name}": "talk to it"} | found
    return found


def _stops(show: "Watcher", connection: str, on_interrupt: str, run_id: str) -> bool:
    """Whether to stop a deployment's run when its submitter is interrupted; says what happens to it."""
    from bora_fl.deployment.progress import LiveView

    if isinstance(show, LiveView):
        show.close()
    stops = on_interrupt == "stop"
    with contextlib.suppress(KeyboardInterrupt, EOFError, SystemExit):
        if on_interrupt == "ask" and sys.stdin.isatty() and isinstance(sys.exception(), KeyboardInterrupt):
            stops = console.input(f"\nstop run {run_id}? [y/N] ").strip().lower() in ("y", "yes")
    if stops:
        _show(f"stopping run {run_id}")
    else:
        _show(
            f"run {run_id} goes on. Follow it with `bora-fl run --attach {run_id} {connection}`, "
            f"stop it with `bora-fl stop {run_id} {connection}`"
        )
    return stops


if __name__ == "__main__":
    main()
