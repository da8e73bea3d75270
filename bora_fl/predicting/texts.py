"""The texts to predict for: lines, or a column of a table."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bora_fl.config import ConfigError
from bora_fl.data.columns import TOOLS, with_context
from bora_fl.data.files import SUFFIXES, read_table
from bora_fl.data.messages import clean, from_json, read_tools
from bora_fl.data.prompts import before_answer


class Conversation(NamedTuple):
    """Messages, each with a role, and the functions that they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


class _Form(NamedTuple):
    """What stands where: as the arguments of `read_texts`."""

    column: str
    dialogs: bool = False
    context: str = ""
    words: bool = False


def read_texts(source: str, column: str, *, dialogs: bool = False, context: str = "", words: bool = False) -> list[Any]:
    """Read texts, or conversations.

    Args:
        source: A parquet, JSONL, JSON, CSV or TSV file, any other file for its lines, or ``-`` for standard input. A
            line that is a JSON object stands for its `column`.
        column: The column of the texts.
        dialogs: Whether a value may be a list of messages, or its JSON text, with functions in the column ``tools``.
        context: Column of what a text is about, as for ``data.context-column``; rows may lack it.
        words: Whether a value may be a list of words.

    Returns:
        Texts, and a `Conversation` for each list of messages.

    Raises:
        ConfigError: If there is no such file or column, or a value is no text.
    """
    form = _Form(column, dialogs, context, words)
    if source == "-":
        return _lines(utf8_lines(sys.stdin, "standard input"), "standard input", form)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(f"FILE {source}: there is no such file; give a file of texts, or - for standard input")
    if path.suffix.lower() not in SUFFIXES:
        with path.open(encoding="utf-8-sig") as file:
            return _lines(utf8_lines(file, f"FILE {source}"), source, form)
    table = read_table(path, {column, context} - {""})
    if column not in table.column_names:
        raise _missing(source, column, table.column_names)
    rows = table.select([name for name in table.column_names if name in (column, context, TOOLS)]).to_pylist()
    return [_value(row, f"{source}, row {number}", form) for number, row in enumerate(rows, 1)]


def utf8_lines(lines: Iterable[str], where: str) -> Iterator[str]:
    """The lines of a text file.

    Raises:
        ConfigError: If it has another encoding.
    """
    try:
        for line in lines:
            line.encode()  # standard input may let bytes through as half characters
            yield line
    except UnicodeError as error:
        raise ConfigError(f"{where}: it is not UTF-8 ({error}); convert it, as with iconv -f latin1 -t utf8") from None


def _lines(lines: Iterable[str], source: str, form: _Form) -> list[Any]:
    texts = []
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if not line:
            continue
        row: Any = {form.column: line}
        if line.startswith("{"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{source}, line {number}: it begins as a JSON object and is none ({error})"
                ) from None
            if form.column not in row:
                raise _missing(f"{source}, line {number}", form.column, list(row))
        texts.append(_value(row, f"{source}, line {number}", form))
    return texts


def _value(row: Mapping[str, Any], where: str, form: _Form) -> Any:
    column, dialogs, context, words = form
    value, about = row[column], row.get(context)
    if isinstance(value, str) and about is not None:
        if not isinstance(about, str):
            raise ConfigError(f"{where}: {context} = {about!r} is no text; give a string")
        value = with_context(value, about)
    if dialogs and isinstance(value, str):
        value = from_json(value) or value
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {column} holds half a character ({error.reason}); mend the text") from None
    if dialogs and isinstance(value, list) and all(isinstance(message, dict) for message in value):
        try:
            found = Conversation(clean(value), read_tools(row.get(TOOLS)))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if not before_answer(found.messages)[0] or any("role" not in message for message in found.messages):
            raise ConfigError(
                f"{where}: {column} holds nothing to answer, or a message without a role; give role and content"
            )
        return found
    if words and isinstance(value, list) and all(isinstance(word, str) for word in value):
        return value
    if not isinstance(value, str):
        wanted = "a string, or a list of words" if words else "a string"
        raise ConfigError(f"{where}: {column} = {value!r} is no text; give {wanted}")
    return value


def _missing(where: str, column: str, found: list[str]) -> ConfigError:
    return ConfigError(f"{where}: there is no column {column!r} among {', '.join(found)}; name one with --text-column")
