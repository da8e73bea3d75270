"""What a data set's settings may be, judging by its columns: a proposal for the user to look over, never a decision."""

import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bora_fl.config import ConfigError, DataSettings, Scalar
from bora_fl.data.columns import IDS, TEXTS, is_text, resolved, usual
from bora_fl.data.embedded import PREFIX
from bora_fl.data.files import data_files, looks_local, read_tables

LABELS = ("label", "labels", "class", "category", "sentiment", "topic", "target", "rating", "stars")
_EMBEDDED_IDS = 4  # natural ids that each embedded data set has at least
_LENGTHS = (32, 256)
_CAUSAL_LENGTHS = (64, 1024)
_CHARACTERS_A_TOKEN = 4
_LOOKED_AT = 10_000  # rows for the length of an example


def guess_task(name: str) -> str:
    """``causal-lm`` for local data of messages, of preference pairs, or of prompts with responses and no label.

    Args:
        name: As for ``data.name``; what a hub data set holds is not looked up.
    """
    path = Path(name).expanduser()
    files = data_files(path) if looks_local(name) and path.exists() else []
    if not files:
        return "classification"
    columns = {field.name: field.type for field in read_tables(files[:1]).schema}
    kind = resolved(DataSettings(name=name, label_column=""), columns).format
    labelled = usual(LABELS[:3], list(columns))
    return (
        "causal-lm" if kind in ("messages", "preference") or (kind == "prompt" and not labelled) else "classification"
    )


def guess_settings(name: str, causal: bool, num_clients: int, given: dict[str, str]) -> dict[str, Scalar]:
    """Settings of the group ``data``, and ``model.max-length``, for a data set.

    Args:
        name: As for ``data.name``.
        causal: Whether a language model is trained, not a classifier.
        num_clients: Number of clients; 0 for a deployment, whose sites have data of their own.
        given: Columns that are known: ``text-column``, ``label-column``, ``response-column``.

    Returns:
        By ``group.key``; what a hub data set holds is not looked up.

    Raises:
        ConfigError: If local data cannot be read, or has no column that is the text or the label.
    """
    found: dict[str, Scalar] = {"data.name": name, **{f"data.{key}": value for key, value in given.items()}}
    defaults, dealt = DataSettings(), {"data.partition": "iid"} if causal else _dirichlet()
    if name.startswith(PREFIX):
        if causal:
            found = {"data.text-column": "instruction", "data.response-column": "response", **found}
            found["model.max-length"] = 96
        return found | (_natural() if num_clients <= _EMBEDDED_IDS else dealt)
    if not looks_local(name):
        return found | dealt
    path = Path(name).expanduser()
    files = data_files(path) if path.exists() else []
    if not files:
        raise ConfigError(f"data.name = {name!r}: {path.absolute()} holds no data; give an existing file or folder")
    train = next((file for file in files if defaults.train_split in file.stem), files[0])
    table = read_tables([train])
    if causal:
        named = {key.replace("-", "_"): _named(table, key, value) for key, value in given.items()}
        columns = {field.name: field.type for field in table.schema}
        rows = resolved(DataSettings(name=name, label_column="", **named), columns)
        if rows.format != "preference" or rows.text_column:
            _named(table, "text-column", rows.text_column)
        found |= {"data.format": rows.format, "data.text-column": rows.text_column}
        found |= {"data.label-column": "", "data.response-column": rows.response_column}
        if rows.rejected_column:
            found["data.rejected-column"] = rows.rejected_column
        texts = [name for name in (rows.text_column, rows.response_column) if name]
        found["model.max-length"] = _max_length(table, texts, _CAUSAL_LENGTHS)
    else:
        text = _column(table, "text-column", TEXTS, given, texts=True)
        found |= {"data.text-column": text, "data.label-column": _column(table, "label-column", LABELS, given)}
        found["model.max-length"] = _max_length(table, [text], _LENGTHS)
    whole = num_clients > 0 and (len(files) == 1 or defaults.train_split not in train.stem)  # a part can be held out
    if not whole and not _has_test_split(table, files, defaults.test_split):
        found["data.test-split"] = ""
    fitting = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    used = {value for key, value in found.items() if key.endswith("-column")}
    name = usual(IDS, [column for column in fitting if column not in used])
    ids = pc.count_distinct(table[name]).as_py() if name and not table[name].null_count else 0
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


def _column(table: pa.Table, key: str, names: Sequence[str], given: dict[str, str], *, texts: bool = False) -> str:
    """The column that is named, else the first with a usual name, else, for texts, the only one that holds text."""
    if key in given:
        return _named(table, key, given[key])
    fitting = [name for name in table.column_names if not texts or is_text(table[name].type)]
    found = usual(names, fitting) or (fitting[0] if texts and len(fitting) == 1 else "")
    if not found:
        columns = ", ".join(table.column_names)
        raise ConfigError(f"data.{key}: none of the columns {columns} has a usual name; name one with --{key}")
    return found


def _has_test_split(table: pa.Table, files: Sequence[Path], split: str) -> bool:
    if "split" in table.column_names:
        return split in pc.unique(table["split"].cast(pa.string())).to_pylist()
    return len(files) > 1 and any(split in file.stem or split in file.parts for file in files)


def _max_length(table: pa.Table, columns: Sequence[str], bounds: tuple[int, int]) -> int:
    """Tokens that most rows are no longer than, in steps of 16."""
    rows = [table[name][:_LOOKED_AT] for name in columns]
    lengths = [pc.utf8_length(row) if is_text(row.type) else _characters(row) for row in rows]
    length = pc.quantile(reduce(pc.add, lengths), 0.95)[0].as_py() or 0.0
    steps = -(-int(length / _CHARACTERS_A_TOKEN) // 16)
    return min(max(16 * steps, bounds[0]), bounds[1])


def _characters(dialogs: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([[len(json.dumps(row, ensure_ascii=False)) for row in dialogs.to_pylist()]])
