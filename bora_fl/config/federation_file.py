"""``federation.toml``: what ``bora-fl run`` does in a folder, as ``bora-fl init`` writes it.

The table ``[federation]`` says who takes part; every other table is a group of the run config.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bora_fl.config.groups import ConfigError, Scalar
from bora_fl.config.run_config import describe, parse, suggest
from bora_fl.config.settings import Settings

FEDERATION_FILE = "federation.toml"
HEAD = """\
# What is trained, on what and by whom. `bora-fl run` reads this file in the folder that it is called in.
# Any other setting may stand here in the table of its group; `bora-fl config` lists all with their defaults.
"""
MEANINGS = {
    "simulate": "clients to simulate on this machine",
    "connection": "or a SuperLink connection of Flower's config.toml, to run on a deployment",
}


@dataclass(frozen=True)
class Federation:
    """Who takes part, and the settings that are not the defaults.

    Attributes:
        simulate: Simulated clients; 0 for a deployment.
        connection: A SuperLink connection of Flower's config.toml; empty for a simulation.
        run_config: Overrides of the run config, by ``group.key``.
    """

    simulate: int = 0
    connection: str = ""
    run_config: Mapping[str, Scalar] = field(default_factory=dict)


def read_federation(folder: Path) -> Federation:
    """Read the file of a folder; the empty federation if there is none.

    Raises:
        ConfigError: For a file that is no TOML, or a key or value that cannot be used, with the file's name.
    """
    path = folder / FEDERATION_FILE
    if not path.is_file():
        return Federation()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{FEDERATION_FILE}: it is no TOML ({error}); strings stand in double quotes") from None
    try:
        who = tables.pop("federation", {})
        run_config = _flat(tables)
        parse(run_config)
        return Federation(**_who(who), run_config=run_config)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{FEDERATION_FILE}: {line}" for line in str(error).splitlines())) from None


def federation_text(federation: Federation) -> str:
    """The file's text, each key under its meaning."""
    meanings = {key: meaning for key, _, meaning in describe()}
    lines = [HEAD, "[federation]"]
    for name, value in (("simulate", federation.simulate), ("connection", federation.connection)):
        lines += [f"# {MEANINGS[name]}", f"{name} = {json.dumps(value)}" if value else f"# {name} ="]
    for group in Settings.model_fields:
        chosen = {key: value for key, value in federation.run_config.items() if key.startswith(f"{group}.")}
        if chosen:
            lines += ["", f"[{group}]"]
        for key, setting in chosen.items():
            # JSON writes these as TOML does.
            lines += [f"# {meanings[key]}", f"{key.partition('.')[2]} = {json.dumps(setting, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


def _who(table: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError(f"federation = {table!r}: it is a table; write [federation] above its keys")
    for key, value in table.items():
        if key not in MEANINGS:
            raise ConfigError(f"federation.{key} = {value!r}: no such key; use one of {', '.join(MEANINGS)}")
    simulate, connection = table.get("simulate", 0), table.get("connection", "")
    if type(simulate) is not int or simulate < 0:
        raise ConfigError(f"federation.simulate = {simulate!r}: write the number of clients to simulate")
    if not isinstance(connection, str):
        raise ConfigError(f"federation.connection = {connection!r}: write the name of a SuperLink connection")
    if simulate and connection:
        raise ConfigError(
            f"federation.simulate = {simulate} with federation.connection = {connection!r}: a run is simulated or goes "
            "to a deployment; leave one out"
        )
    return {"simulate": simulate, "connection": connection}


def _flat(tables: Mapping[str, Any]) -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for group, keys in tables.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"{group} = {keys!r}: it stands in no table; {suggest(group)}")
        for key, value in keys.items():
            if not isinstance(value, bool | int | float | str):
                raise ConfigError(f"{group}.{key} = {value!r}: write a number, true, false or a string")
            flat[f"{group}.{key}"] = value
    return flat
