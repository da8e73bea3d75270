"""The texts to predict for: lines, or a column of a table."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bora_fl.config import ConfigError
from bora_fl.data.files import SUFFIXES, read_table


def read_texts(source: str, column: str, *, dialogs: bool = False) -> list[Any]:
    """Read texts, or conversations.

    Args:
        source: A parquet, JSONL, JSON, CSV or TSV file, any other file for its lines, or ``-`` for standard input. A
            line that is a JSON object stands for its `column`.
        column: The column of the texts.
        dialogs: Whether a value may be a list of messages.

    Raises:
        ConfigError: If there is no such file or column, or a value is no text.
    """
    if source == "-":
        return _lines(sys.stdin, "standard input", column, dialogs)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(f"FILE {source}: there is no such file; give a file of texts, or - for standard input")
    if path.suffix.lower() not in SUFFIXES:
        try:
            with path.open(encoding="utf-8-sig") as file:
                return _lines(file, source, column, dialogs)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"FILE {source}: it is not UTF-8 ({error}); convert it, as with iconv -f latin1 -t utf8"
            ) from None
    table = read_table(path)
    if column not in table.column_names:
        raise _missing(source, column, table.column_names)
    return [
        _value(value, f"{source}, row {number}", column, dialogs)
        for number, value in enumerate(table[column].to_pylist(), 1)
    ]


def _lines(lines: Iterable[str], source: str, column: str, dialogs: bool) -> list[Any]:
    texts = []
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if not line:
            continue
        value: Any = line
        if line.startswith("{"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{source}, line {number}: it begins as a JSON object and is none ({error})"
                ) from None
            if column not in row:
                raise _missing(f"{source}, line {number}", column, list(row))
            value = row[column]
        texts.append(_value(value, f"{source}, line {number}", column, dialogs))
    return texts


def _value(value: object, where: str, column: str, dialogs: bool) -> Any:
    if dialogs and isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {column} = {value!r} is no text; give a string")
    return value


def _missing(where: str, column: str, found: list[str]) -> ConfigError:
    return ConfigError(f"{where}: there is no column {column!r} among {', '.join(found)}; name one with --text-column")
