"""The pages of the site that are made from the code: settings, commands, the Python functions.

A hook of MkDocs (`make docs`).
"""

from collections.abc import Iterator

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.main import get_command

PYTHON = """# Python

The functions of `import bora_fl`.

::: bora_fl.api

## The adapter

::: bora_fl.adapters.config.BoraConfig

## A strategy's round

::: bora_fl.strategies.layer_merge

## The laws

::: bora_fl.testing.laws.check
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, text in (("settings", settings()), ("commands", commands()), ("python", PYTHON)):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def settings() -> str:
    """A table of each group of the run config."""
    from bora_fl.config import Settings, describe

    lines = [
        "# Settings",
        "",
        "In `federation.toml` as `[group]` and `key`, on the command line as `-c group.key=value`.",
        "",
    ]
    for group in Settings.model_fields:
        lines += [f"## {group}", "", "| key | default | meaning |", "|---|---|---|"]
        lines += [f"| `{key}` | `{value!r}` | {_cell(meaning)} |" for key, value, meaning in describe(group)]
        lines.append("")
    return "\n".join(lines)


def commands() -> str:
    """Each command with its arguments and options."""
    from bora_fl.cli import cli

    lines = ["# Commands", ""]
    for path, command in _walk("bora-fl", get_command(cli)):
        lines += [f"## {path}", "", (command.help or "").strip(), ""]
        rows = [parameter for parameter in command.params if parameter.name != "help"]
        if rows and not isinstance(command, click.Group):
            lines += ["| | default | meaning |", "|---|---|---|"]
            lines += [_row(parameter) for parameter in rows]
            lines.append("")
    return "\n".join(lines)


def _walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        if path != "bora-fl":
            yield path, command
        for name, below in sorted(command.commands.items()):
            yield from _walk(f"{path} {name}", below)
    else:
        context = command.make_context(path, [], resilient_parsing=True)  # imports a command that is elsewhere
        yield path, context.command


def _row(parameter: click.Parameter) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.opts) if parameter.opts else f"`{parameter.name}`"
    if isinstance(parameter, click.Argument):
        names = f"`{(parameter.name or '').upper()}`"
    default = parameter.default
    shown = f"`{default}`" if default not in (None, "", [], ()) and not callable(default) else ""
    return f"| {names} | {shown} | {_cell(getattr(parameter, 'help', '') or '')} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
