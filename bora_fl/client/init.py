"""``bora-fl init site``: write a site's policy, every key with its meaning."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from pydantic import BaseModel

console = Console()


def site(
    data_set: Annotated[str, typer.Option(help="the data set's name, by which its privacy ledger goes")],
    data: Annotated[str, typer.Option(help="where the data is: a file, a folder, or what data.name takes")],
    model: Annotated[
        list[str], typer.Option(help="a base model to trust, as name or name@revision; may be given again")
    ],
    mode: Annotated[list[str] | None, typer.Option(help="a privacy mode to allow; record and local by default")] = None,
    into: Annotated[Path, typer.Option(help="the file to write")] = Path("policy.toml"),
) -> None:
    """Write the policy that decides what a run may ask of this site; `bora-fl worker --policy` takes it."""
    from bora_fl.config import ConfigError
    from bora_fl.privacy.policy import read_policy

    chosen: dict[str, Any] = {"data-set": data_set, "data-path": data, "models": model}
    if mode:
        chosen["modes"] = mode
    text = policy_text(chosen)
    try:
        with open(os.open(into, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf8") as new:
            new.write(text)
    except FileExistsError:
        raise ConfigError(f"--into {into}: it exists; a policy is never overwritten") from None
    except OSError as error:
        raise ConfigError(
            f"--into {into}: it cannot be written ({error}); name a file in a folder that exists"
        ) from None
    try:
        read_policy(into)
    except ConfigError:
        into.unlink()
        raise
    console.print(f"wrote {into}", highlight=False, soft_wrap=True)
    console.print(f"name it to the site: bora-fl worker --policy {into.absolute()}", highlight=False, soft_wrap=True)


def policy_text(chosen: dict[str, Any]) -> str:
    """A policy file with every key; those that are not chosen stand there with their defaults.

    Args:
        chosen: Keys of the file's top level, with hyphens.
    """
    from bora_fl.privacy.policy import SitePolicy

    head = [
        "# What a run may ask of this site. The site's own processes read this file; no run config changes it.",
        "# A key that is not known, or has a wrong value, stops all training here.",
        "",
    ]
    return "\n".join([*head, *_entries(SitePolicy, chosen)]) + "\n"


def _entries(group: "type[BaseModel]", chosen: dict[str, Any]) -> Iterator[str]:
    from pydantic import BaseModel

    tables = []
    for name, info in group.model_fields.items():
        key = name.replace("_", "-")
        if isinstance(info.default, BaseModel):
            tables.append((key, info))
            continue
        value = chosen.get(key, None if info.is_required() else info.default)
        yield f"# {info.description}"
        # JSON writes strings, numbers, booleans and lists of them as TOML does, if not in ASCII; TOML has no null.
        yield f"# {key} =" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}"
        yield ""
    for key, info in tables:
        yield f"# {info.description}"
        yield f"[{key}]"
        yield from _entries(type(info.default), {})
