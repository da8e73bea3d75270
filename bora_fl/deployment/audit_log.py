"""``bora-fl audit-log``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()
audit_log = typer.Typer(no_args_is_help=True, help="The append-only log of what left a site or came of a round.")


@audit_log.callback()
def _commands() -> None:
    """Keep `verify` a command of its own: Typer would take a single one for the whole."""


@audit_log.command("verify")
def verify_log(
    path: Annotated[Path, typer.Argument(help="audit.jsonl in a site's state folder or a run's output folder")],
    expect: Annotated[str, typer.Option(help="digest that an earlier verify printed; it must still be there")] = "",
) -> None:
    """Check that no line of an audit log was changed or taken away; exit 1 with the first broken line if one was."""
    from bora_fl.config import ConfigError
    from bora_fl.privacy.audit_log import verify

    try:
        found = verify(path, expect)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; name an audit log of this package") from error
    if found.note:
        console.print(f"note: {found.note}", highlight=False, markup=False, soft_wrap=True)
    if found.problem:
        console.print(f"broken: {found.problem}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1)
    console.print(f"ok: {found.lines} lines, last {found.last}", highlight=False, markup=False, soft_wrap=True)
