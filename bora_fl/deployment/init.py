"""``bora-fl init``: write a federation.toml for a task, a model and data; ``bora-fl init site``: a site's policy."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bora_fl.client.init import site

if TYPE_CHECKING:
    from bora_fl.config import Scalar

console = Console()
init = typer.Typer(help="Write the federation.toml that `bora-fl run` reads; `init site` writes a site's policy.")
init.command("site")(site)

MODELS = dict.fromkeys(("classification", "multi-label", "token-classification", "regression"), "embedded:minilm")
MODELS |= {"causal-lm": "embedded:smollm2"}
DATA = {
    "classification": "embedded:sentiment4",
    "regression": "embedded:ratings4",
    "causal-lm": "embedded:docstrings4",
}
# Settings that are written down although they may be at their defaults: those that most users come to change.
SHOWN = (
    *("model.name", "model.task", "model.max-length", "adapter.rank", "adapter.num-blocks", "adapter.target-modules"),
    *("train.local-steps", "train.batch-size", "train.learning-rate", "strategy.name", "privacy.mode"),
    *("run.num-rounds", "run.output-dir", "run.seed"),
)


@init.callback(invoke_without_command=True)
def federation(
    context: typer.Context,
    task: Annotated[
        str,
        typer.Option(help="as for model.task; by the data if it is not given"),
    ] = "",
    model: Annotated[str, typer.Option(help="hub id, local folder, or embedded:minilm | embedded:smollm2")] = "",
    data: Annotated[str, typer.Option(help="hub id, local file or folder, or embedded:sentiment4 | ...")] = "",
    clients: Annotated[int, typer.Option(help="clients to simulate on this machine", min=0)] = 0,
    connection: Annotated[
        str,
        typer.Option(help="instead: a SuperLink connection of Flower's config.toml; each site has its own data"),
    ] = "",
    strategy: Annotated[str, typer.Option(help="a row of `bora-fl strategies`")] = "",
    text_column: Annotated[str, typer.Option(help="column of the texts or prompts")] = "",
    label_column: Annotated[str, typer.Option(help="column of the classes, or numbers")] = "",
    response_column: Annotated[str, typer.Option(help="column of the answers (causal-lm)")] = "",
) -> None:
    """Write the federation.toml that `bora-fl run` reads; in a terminal, ask for what is not given.

    `bora-fl init site` writes a site's policy.
    """
    if context.invoked_subcommand is not None:
        return
    from bora_fl.config import FEDERATION_FILE, ConfigError, Federation, extras, federation_text, parse
    from bora_fl.data.guessing import guess_task

    if clients and connection:
        raise ConfigError(f"--clients {clients} with --connection {connection}: give one of them")
    path = Path(FEDERATION_FILE)
    if path.exists():
        raise ConfigError(f"{FEDERATION_FILE}: it exists here; it is never overwritten")
    if task and task not in MODELS:
        raise ConfigError(f"--task {task}: use one of {', '.join(MODELS)}")
    if not data and task and task not in DATA:
        raise ConfigError(f"--task {task}: no data set that comes along is for it; name yours with --data")
    data = data or _ask("data (file, folder or hub id)", DATA[task or "classification"])
    task = task or _ask(f"task ({', '.join(MODELS)})", guess_task(data, label_column))
    if task not in MODELS:
        raise ConfigError(f"--task {task}: use one of {', '.join(MODELS)}")
    model = model or _ask("model (hub id or folder)", MODELS[task])
    if model.startswith("embedded:"):
        extras.require_model(model)
    if not connection:
        number = str(clients) if clients else _ask("clients to simulate", "4").strip()
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"clients to simulate: {number!r} is no number of clients; write 1 or more")
        clients = int(number)
    strategy = strategy or _ask("strategy", "refactor")
    columns = {"text-column": text_column, "label-column": label_column, "response-column": response_column}
    given = {key: value for key, value in columns.items() if value}
    chosen = proposal(task, model, data, clients, strategy, given)
    if connection:
        chosen = {key: value for key, value in chosen.items() if key not in ("data.partition-by", "data.alpha")}
        chosen["data.partition"] = "local"
    parse(chosen)
    text = federation_text(Federation(clients, connection, chosen))
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "w", encoding="utf8") as new:
        new.write(text)
    console.print(f"wrote {path}; look it over, then start with `bora-fl run`", highlight=False, soft_wrap=True)


def proposal(
    task: str, model: str, data: str, clients: int, strategy: str, columns: dict[str, str]
) -> "dict[str, Scalar]":
    """The settings to write down, by ``group.key`` and in the order of the groups.

    Args:
        task: As for ``model.task``.
        model: As for ``model.name``.
        data: As for ``data.name``.
        clients: Simulated clients.
        strategy: As for ``strategy.name``.
        columns: Columns that are known, by ``text-column``, ``label-column`` and ``response-column``.

    Raises:
        ConfigError: For a strategy, a model, data or a column that cannot be used.
    """
    from bora_fl.config import Settings
    from bora_fl.data.guessing import guess_settings
    from bora_fl.models.guessing import guess_settings as of_model
    from bora_fl.strategies.catalogue import find

    find(strategy, "--strategy")
    stem = Path(data.partition(":")[2] if data.startswith("embedded:") else data).stem
    stem = stem if stem.strip(".") else Path(data).resolve().name  # of the working folder
    default = Settings().flat()
    found = {key: default[key] for key in SHOWN} | guess_settings(data, task, clients, columns)
    found |= {"model.task": task, "strategy.name": strategy, "run.output-dir": f"runs/{stem}"}
    found |= of_model(model, int(found["model.max-length"]))
    return {key: found[key] for key in default if key in found}


def _ask(question: str, default: str) -> str:
    """The answer of whoever sits at the terminal; the default where nobody does."""
    return str(typer.prompt(question, default=default)) if sys.stdin.isatty() else default
