"""What a data set's settings may be, judging by its columns: a proposal for the user to look over, never a decision."""

import json
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from bora_fl.config import ConfigError, DataSettings, Scalar
from bora_fl.data.columns import (
    IDS,
    TEXTS,
    WORDS,
    is_text,
    is_words,
    kinds,
    num_missing,
    resolved,
    text_names,
    usual,
)
from bora_fl.data.embedded import PREFIX
from bora_fl.data.files import SUFFIXES, data_files, is_saved, looks_local, read_tables
from bora_fl.data.labels import is_list, is_number

LABELS = ("label", "labels", "class", "category", "sentiment", "topic", "target", "rating", "stars")
TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags")
NUMBERS = ("score", "value")
_EMBEDDED_IDS = 4  # natural ids that each embedded data set has at least
_LENGTHS = (32, 256)
_CAUSAL_LENGTHS = (64, 1024)
_CHARACTERS_A_TOKEN = 4
_LOOKED_AT = 10_000  # rows for the length of an example


def guess_task(name: str, label_column: str = "") -> str:
    """What local data may be trained for, judging by its columns.

    Args:
        name: As for ``data.name``; what a hub data set holds is not looked up.
        label_column: The column of the classes, if it is known.

    Returns:
        ``causal-lm`` for messages, preference pairs, or prompts with responses and no label, ``token-classification``
        for lists of words with lists of labels, ``multi-label`` for texts with lists of labels, ``regression`` for
        texts with numbers that are not all whole.
    """
    found = _look(name) if looks_local(name) else None
    if found is None:
        return "classification"
    labels = label_column or usual((*LABELS, *TAGS, *NUMBERS), found.table.column_names)
    if labels in found.table.column_names and is_list(found.table[labels].type):
        words = [name for name in found.table.column_names if name != labels and is_words(found.table[name].type)]
        return "token-classification" if words else "multi-label"
    number = labels in found.table.column_names and is_number(found.table[labels])
    if label_column:
        return "regression" if number else "classification"
    settings = DataSettings(name=name, label_column="")
    columns = kinds(found.table, settings)
    kind = resolved(settings, columns).format
    labelled = usual(LABELS[:3], list(columns))
    if kind in ("messages", "preference") or (kind == "prompt" and not labelled):
        return "causal-lm"
    return "regression" if number else "classification"


def guess_settings(name: str, task: str, num_clients: int, given: dict[str, str]) -> dict[str, Scalar]:
    """Settings of the group ``data``, and ``model.max-length``, for a data set.

    Args:
        name: As for ``data.name``.
        task: As for ``model.task``.
        num_clients: Number of clients; 0 for a deployment, whose sites have data of their own.
        given: Columns that are known: ``text-column``, ``label-column``, ``response-column``.

    Returns:
        By ``group.key``; what a hub data set holds is not looked up.

    Raises:
        ConfigError: If local data cannot be read, or has no column that is the text or the label.
    """
    causal = task == "causal-lm"
    found: dict[str, Scalar] = {"data.name": name, **{f"data.{key}": value for key, value in given.items()}}
    dealt = _dirichlet() if task in ("classification", "regression") else {"data.partition": "iid"}
    if name.startswith(PREFIX):
        if causal:
            found = {"data.text-column": "instruction", "data.response-column": "response", **found}
            found["model.max-length"] = 96
        return found | (_natural() if num_clients <= _EMBEDDED_IDS else dealt)
    if not looks_local(name):
        return found | dealt
    rows = _look(name)
    if rows is None:
        path = Path(name).expanduser().absolute()
        raise ConfigError(
            f"data.name = {name!r}: {path} holds no data; give a file or a folder of files {', '.join(SUFFIXES)}"
        )
    table = rows.table
    if causal:
        named = {key.replace("-", "_"): _named(table, key, value) for key, value in given.items()}
        settings = DataSettings(name=name, label_column="", **named)
        kind = resolved(settings, kinds(table, settings))
        if kind.format != "preference" or kind.text_column:
            _named(table, "text-column", kind.text_column)
        found |= {"data.format": kind.format, "data.text-column": kind.text_column}
        found |= {"data.label-column": "", "data.response-column": kind.response_column}
        if kind.context_column:
            found["data.context-column"] = kind.context_column
        if kind.rejected_column:
            found["data.rejected-column"] = kind.rejected_column
        texts = [name for name in (kind.text_column, kind.response_column) if name]
        found["model.max-length"] = _max_length(table, texts, _CAUSAL_LENGTHS)
    else:
        words = task == "token-classification"
        text = _column(table, "text-column", WORDS if words else TEXTS, given, fits=is_words if words else is_text)
        labels = (*TAGS, *LABELS) if words else (*LABELS, *NUMBERS) if task == "regression" else LABELS
        found |= {"data.text-column": text, "data.label-column": _column(table, "label-column", labels, given)}
        found["model.max-length"] = _max_length(table, [text], _LENGTHS)
    if not (rows.whole and num_clients > 0) and not rows.has_test:
        found["data.test-split"] = ""
    fitting = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    used = {value for key, value in found.items() if key.endswith("-column")}
    name = usual(IDS, [column for column in fitting if column not in used])
    ids = pc.count_distinct(table[name]).as_py() if name and not num_missing(table[name]) else 0
    return found | (_natural(name) if ids >= max(num_clients, 2) else dealt)


def _natural(name: str = DataSettings().partition_by) -> dict[str, Scalar]:
    return {"data.partition": "natural", "data.partition-by": name}


def _dirichlet() -> dict[str, Scalar]:
    return {"data.partition": "dirichlet", "data.alpha": DataSettings().alpha}


def _named(table: pa.Table, key: str, name: str) -> str:
    """A column's name, if it is there."""
    if name not in table.column_names:
        raise ConfigError(f"--{key} {name}: columns are {', '.join(table.column_names)}; name one of them")
    return name


def _column(
    table: pa.Table,
    key: str,
    names: Sequence[str],
    given: dict[str, str],
    *,
    fits: Callable[[pa.DataType], bool] | None = None,
) -> str:
    """The column that is named, else the first with a usual name, else the only one of a kind that is asked for."""
    if key in given:
        return _named(table, key, given[key])
    fitting = [name for name in table.column_names if fits is None or fits(table[name].type)]
    found = usual(names, fitting) or (fitting[0] if fits and len(fitting) == 1 else "")
    if not found:
        columns = ", ".join(table.column_names)
        raise ConfigError(f"data.{key}: none of the columns {columns} has a usual name; name one with --{key}")
    return found


class _Rows(NamedTuple):
    """The training rows of local data, whether a part of them can be held out, and whether there is a test split."""

    table: pa.Table
    whole: bool
    has_test: bool


def _look(name: str) -> _Rows | None:
    """What a path holds; None for nothing."""
    path, splits = Path(name).expanduser(), DataSettings()
    if is_saved(path):
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(path))
        parts = saved if isinstance(saved, DatasetDict) else {}
        train = parts.get(splits.train_split, next(iter(parts.values()))) if parts else saved
        return _Rows(train.data.table, not parts, splits.test_split in parts)
    files = [file for file in data_files(path) if file.suffix.lower() in SUFFIXES] if path.exists() else []
    if not files:
        return None
    first = next((file for file in files if splits.train_split in file.stem), files[0])
    table = read_tables([first], text_names(splits))
    whole = len(files) == 1 or splits.train_split not in first.stem
    if "split" in table.column_names:
        has_test = splits.test_split in pc.unique(table["split"].cast(pa.string())).to_pylist()
    else:
        has_test = len(files) > 1 and any(
            splits.test_split in file.stem or splits.test_split in file.parts for file in files
        )
    return _Rows(table, whole, has_test)


def _max_length(table: pa.Table, columns: Sequence[str], bounds: tuple[int, int]) -> int:
    """Tokens that most rows are no longer than, in steps of 16."""
    rows = [table[name][:_LOOKED_AT] for name in columns]
    lengths = [pc.utf8_length(row) if is_text(row.type) else _characters(row) for row in rows]
    length = pc.quantile(reduce(pc.add, lengths), 0.95)[0].as_py() or 0.0
    steps = -(-int(length / _CHARACTERS_A_TOKEN) // 16)
    return min(max(16 * steps, bounds[0]), bounds[1])


def _characters(dialogs: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([[len(json.dumps(row, ensure_ascii=False)) for row in dialogs.to_pylist()]])
