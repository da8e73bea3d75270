"""What a data set's settings may be, judging by its columns: a proposal for the user to look over, never a decision."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bora_fl.config import ConfigError, DataSettings, Scalar
from bora_fl.data.embedded import PREFIX
from bora_fl.data.files import data_files, looks_local, read_table

TEXTS = ("text", "sentence", "review", "content", "body", "document", "comment", "question", "title")
PROMPTS = ("instruction", "prompt", "question", "input", *TEXTS)
LABELS = ("label", "labels", "class", "category", "sentiment", "topic", "target", "rating", "stars")
RESPONSES = ("response", "output", "answer", "completion")
_EMBEDDED_IDS = 4  # natural ids that each embedded data set has at least
_LENGTHS = (32, 256)
_CHARACTERS_A_TOKEN = 4


def guess_settings(name: str, causal: bool, num_clients: int, given: dict[str, str]) -> dict[str, Scalar]:
    """Settings of the group ``data``, and ``model.max-length``, for a data set.

    Args:
        name: As for ``data.name``.
        causal: Whether a language model is trained, not a classifier.
        num_clients: Number of clients.
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
    table = read_table(train)
    text = _column(table, "text-column", PROMPTS if causal else TEXTS, given, texts=True)
    assert text is not None
    found["data.text-column"] = text
    if causal:
        response = _column(table, "response-column", RESPONSES, given, texts=True, needed=False)
        found["data.response-column"] = response or ""
    else:
        label = _column(table, "label-column", LABELS, given)
        assert label is not None
        found["data.label-column"] = label
    if not _has_test_split(table, files, defaults.test_split):
        found["data.test-split"] = ""
    ids = pc.count_distinct(table[defaults.partition_by]).as_py() if defaults.partition_by in table.column_names else 0
    found["model.max-length"] = _max_length(table[text])
    return found | (_natural() if ids >= num_clients else dealt)


def _natural() -> dict[str, Scalar]:
    return {"data.partition": "natural", "data.partition-by": DataSettings().partition_by}


def _dirichlet() -> dict[str, Scalar]:
    return {"data.partition": "dirichlet", "data.alpha": DataSettings().alpha}


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _column(
    table: pa.Table,
    key: str,
    usual: Sequence[str],
    given: dict[str, str],
    *,
    texts: bool = False,
    needed: bool = True,
) -> str | None:
    """The column that is named, else the first with a usual name, else, for texts, the only one that holds text."""
    names: list[str] = table.column_names
    fitting = [name for name in names if not texts or _is_text(table[name].type)]
    if key in given:
        if given[key] not in names:
            raise ConfigError(f"--{key} {given[key]}: columns are {', '.join(names)}; name one of them")
        return given[key]
    by_name = {name.lower(): name for name in reversed(fitting)}
    for name in usual:
        if name in by_name:
            return by_name[name]
    if not needed:
        return None
    if texts and len(fitting) == 1:
        return fitting[0]
    raise ConfigError(f"data.{key}: none of the columns {', '.join(names)} has a usual name; name one with --{key}")


def _has_test_split(table: pa.Table, files: Sequence[Path], split: str) -> bool:
    if "split" in table.column_names:
        return split in pc.unique(table["split"].cast(pa.string())).to_pylist()
    return len(files) > 1 and any(split in file.stem or split in file.parts for file in files)


def _max_length(texts: pa.ChunkedArray) -> int:
    """Tokens that most texts are no longer than, in steps of 16."""
    length = pc.quantile(pc.utf8_length(texts), 0.95)[0].as_py() or 0.0
    steps = -(-int(length / _CHARACTERS_A_TOKEN) // 16)
    return min(max(16 * steps, _LENGTHS[0]), _LENGTHS[1])
