"""Read a data set by its settings, whatever it comes from, and check it: columns, missing values, labels."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bora_fl.config import ConfigError, DataSettings, ModelSettings, extensions
from bora_fl.data import columns, files, labels, messages, preferences
from bora_fl.data.embedded import PREFIX, fetch
from bora_fl.seeds import derive

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

_LOADING_FIELDS = {
    *("name", "subset", "train_split", "test_split", "text_column", "label_column", "response_column"),
    *("context_column", "rejected_column", "format", "max_train_examples", "max_test_examples"),
}
_ROWS, _BYTES = 2048, 4 << 20  # that are Python objects at a time: enough for a tokenizer's threads, little memory
_EXPECTED = 0.9  # share of rows that are complete; fewer are worth a warning
_HELD_OUT, _MOST_HELD_OUT = 0.1, 1000
_recent: tuple[str, "RawData"] | None = None


@dataclass(frozen=True)
class RawData:
    """A data set that has passed the checks.

    Attributes:
        train: What clients train on: no row lacks text, label or response; labels are as `labels.encode` makes them.
        test: The server's central test set, likewise, or None.
        label_names: The C class names; empty where labels are numbers, None where the data has no labels (language
            modelling).
        settings: The settings that it was read by, with ``data.format`` and its columns named.
    """

    train: "Dataset"
    test: "Dataset | None"
    label_names: list[str] | None
    settings: DataSettings

    def logit_names(self, model: ModelSettings) -> list[str] | None:
        """Names of the head's logits: the classes, or the column of the number; None for a language model."""
        if not model.kind.head:
            return None
        return [self.settings.label_column] if model.kind.number else self.label_names

    def texts(self) -> list[str]:
        """Each training row as text; messages as JSON."""
        asked = self.settings.text_column
        found = prompts(self.train, self.settings) if asked else self.train[self.settings.response_column][:]
        return [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in found]


def load_dataset(settings: DataSettings) -> RawData:
    """Read and check a data set. The last one is kept in memory, so asking for it again costs nothing.

    Labels are read if a row is a text, or words, and the data has the column `label_column`; `labels.encode` says how.
    Rows without text, label (null, or negative in a ``ClassLabel``) or response are left out.
    `max_train_examples` and `max_test_examples` draw a subsample that depends on nothing but the data, so that it is
    the same for every run seed. Local data without splits gives a tenth of its rows, 1,000 at most, to the test split
    if that has its default name; where every site has data of its own, ``data.partition = local``, it does not.

    Args:
        settings: The group ``data`` of the run config.

    Returns:
        The training split, the test split if the settings name one, and the class names.

    Raises:
        ConfigError: If the data, a split or a column is missing or of no use; the message names key, value and remedy.
        FetchError: If an embedded data set cannot be made here.
    """
    global _recent
    key = loading_key(settings)
    recent = _recent
    if recent is None or recent[0] != key:
        recent = _recent = (key, _load(settings))
    return recent[1]


def loading_key(settings: DataSettings) -> str:
    """Names what `load_dataset` returns: the settings that matter to it and, for local data, the state of its files."""
    parts = [repr(sorted(settings.model_dump(include=_LOADING_FIELDS).items())), str(_may_hold_out(settings))]
    if not settings.name.startswith(PREFIX) and files.looks_local(settings.name):
        path = Path(settings.name).expanduser()
        stats = [(p, p.stat()) for p in (files.data_files(path) if path.exists() else [])]
        parts += [f"{p.absolute()}:{stat.st_size}:{stat.st_mtime_ns}" for p, stat in stats]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def source_fingerprint(settings: DataSettings, partition: int) -> str:
    """Names a client's data by what lies on disk, so that no setting of a run makes it look like other data.

    Args:
        settings: Where the data is. Local and embedded data is named by its files' contents, hub data by its name.
        partition: The client's partition, from its node config.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(
        f"{_source(loading_key(settings), settings.name, settings.subset)}:{partition}".encode()
    ).hexdigest()


@lru_cache(maxsize=8)
def _source(key: str, name: str, subset: str) -> str:
    if extensions.reference("data", name):
        return "extension"  # whatever its name: no other name makes a client's records look new
    if name.startswith(PREFIX):
        paths = [fetch(name)]
    elif files.looks_local(name):
        paths = files.data_files(Path(name).expanduser())
    else:
        return f"hub:{name}:{subset}"
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def column(data: "Dataset", name: str) -> pa.ChunkedArray:
    """One column of a data set as Arrow data."""
    return data.select_columns([name]).with_format("arrow")[:][name]


def prompts(data: "Dataset", settings: DataSettings) -> list[Any]:
    """The column of texts; a prompt with its context."""
    texts: list[Any] = column(data, settings.text_column).to_pylist()
    if not settings.context_column:
        return texts
    contexts = column(data, settings.context_column).to_pylist()
    return [columns.with_context(*both) for both in zip(texts, contexts, strict=True)]


def parts(data: "Dataset") -> "Iterator[Dataset]":
    """A data set in parts of limited rows and size."""
    for start in range(0, len(data), _ROWS):
        rows = data.select(range(start, min(start + _ROWS, len(data))))
        size = max(len(rows) * _BYTES // max(rows.with_format("arrow")[:].nbytes, 1), 1)
        for first in range(0, len(rows), size):
            yield rows.select(range(first, min(first + size, len(rows))))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _load(settings: DataSettings) -> RawData:
    with quiet():
        train, test = _read(settings)
        settings = columns.resolved(settings, _kinds(train, settings))
        if system := columns.left_out(settings, train.column_names):
            log.warning("column %r is not trained on; write rows as messages (data.format) to train with it", system)
        splits = {settings.train_split: train} | ({} if test is None else {settings.test_split: test})
        splits, names = _encode_labels(splits, settings)
        checked = {name: _drop_incomplete(data, name, settings, names is not None) for name, data in splits.items()}
        train = _subsample(checked[settings.train_split], settings.max_train_examples)
        if test is not None:
            test = _subsample(checked[settings.test_split], settings.max_test_examples)
    return RawData(train, test, names, settings)


def _kinds(data: "Dataset", settings: DataSettings) -> dict[str, pa.DataType]:
    return columns.kinds(data.select(range(min(len(data), _ROWS))).with_format("arrow")[:], settings)


def _read(settings: DataSettings) -> "tuple[Dataset, Dataset | None]":
    if settings.name.startswith(PREFIX):
        return files.read_local(str(fetch(settings.name)), settings.train_split, settings.test_split)
    if extensions.reference("data", settings.name):
        return _read_extension(settings)
    if not files.looks_local(settings.name):
        return _read_hub(settings)
    lenient = _may_hold_out(settings)
    whole, test = files.read_local(
        settings.name,
        settings.train_split,
        settings.test_split,
        may_lack_splits=lenient,
        texts=columns.text_names(settings),
    )
    if test is not None or not lenient or len(whole) < 2:
        return whole, test
    order = np.random.default_rng(derive(0, "test split")).permutation(len(whole))
    held = min(max(round(_HELD_OUT * len(whole)), 1), _MOST_HELD_OUT)
    log.info(
        "%s has no splits: %d of its %d rows are the central test set (data.test-split names another, or none)",
        settings.name,
        held,
        len(whole),
    )
    return whole.select(np.sort(order[held:])), whole.select(np.sort(order[:held]))


def _may_hold_out(settings: DataSettings) -> bool:
    return settings.partition != "local" and settings.test_split == DataSettings().test_split


def _read_extension(settings: DataSettings) -> "tuple[Dataset, Dataset | None]":
    """What a user's own function makes of the settings: a training split, and a test split if it has one."""
    from datasets import Dataset

    made = extensions.load("data", settings.name, "data.name =")(settings)
    train, test = made if isinstance(made, tuple) else (made, None)
    if not isinstance(train, Dataset) or not isinstance(test, Dataset | None):
        raise ConfigError(
            f"data.name = {settings.name!r}: it gives {type(train).__name__} and {type(test).__name__}; return a "
            "datasets.Dataset, or two of them, the second for testing"
        )
    if test is None and settings.test_split:
        raise ConfigError(
            f"data.test-split = {settings.test_split!r}: {settings.name!r} gives no test data; set data.test-split to "
            '""'
        )
    return train, test if settings.test_split else None


def _read_hub(settings: DataSettings) -> "tuple[Dataset, Dataset | None]":
    import datasets

    found = []
    for which, split in (("train", settings.train_split), ("test", settings.test_split)):
        if not split:
            continue
        try:
            found.append(datasets.load_dataset(settings.name, settings.subset or None, split=split))
        except Exception as error:  # the hub's many failures have no common class
            reason = str(error).strip().split("\n")[0]
            where = f"data.{which}-split = {split!r}" if "split" in reason.lower() else f"data.name = {settings.name!r}"
            raise ConfigError(
                f"{where}: the hub data set {settings.name!r} (subset {settings.subset!r}, split {split!r}) cannot be "
                f"loaded ({reason}); check data.name, data.subset and data.{which}-split, or give a local file or an "
                "embedded data set"
            ) from error
    return found[0], found[1] if settings.test_split else None


def _missing(key: str, value: str, data: "Dataset") -> ConfigError:
    return ConfigError(f"data.{key} = {value!r}: columns are {', '.join(data.column_names)}; name one of them")


def _encode_labels(
    splits: "dict[str, Dataset]", settings: DataSettings
) -> "tuple[dict[str, Dataset], list[str] | None]":
    name = settings.label_column
    first = next(iter(splits.values()))
    if settings.format not in ("text", "words") or name not in first.column_names:
        return splits, None
    for data in splits.values():
        if name not in data.column_names:
            raise _missing("label-column", name, data)
    words = {}
    if settings.format == "words":
        words = {split: column(data, settings.text_column) for split, data in splits.items()}
    held = {split: column(data, name) for split, data in splits.items()}
    codes, names = labels.encode(held, words, first.features[name], name)
    return {split: data.remove_columns([name]).add_column(name, codes[split]) for split, data in splits.items()}, names


def _drop_incomplete(data: "Dataset", split: str, settings: DataSettings, labelled: bool) -> "Dataset":
    named = {"text": settings.text_column, "response": settings.response_column, "rejected": settings.rejected_column}
    named = {key: name for key, name in named.items() if name or (key == "text" and settings.format != "preference")}
    kinds = _kinds(data, settings)
    context = {"context": settings.context_column} if settings.context_column else {}
    for key, name in (named | context).items():
        if name not in kinds:
            raise _missing(f"{key}-column", name, data)
        found = kinds[name]
        fits = {"messages": columns.is_dialog, "words": columns.is_words}.get(settings.format, columns.is_text)(found)
        if not fits and not (settings.format == "preference" and columns.is_dialog(found)):
            forms = {"messages": "lists of role and content", "words": "lists of strings"}
            wanted = forms.get(settings.format, "text")
            raise ConfigError(
                f"data.{key}-column = {name!r} with data.format = {settings.format!r}: holds {found}, not {wanted}; "
                f"columns are {', '.join(data.column_names)}"
            )
    keep = _complete(data.select_columns(list(dict.fromkeys(named.values()))), settings)
    if labelled:
        keep &= column(data, settings.label_column).is_valid().to_numpy()
    if not keep.any():
        raise ConfigError(
            f"data.name = {settings.name!r}: no row of split {split!r} has all of text, label and response, messages "
            "with an assistant's turn, or two different responses; check data.text-column, data.label-column, "
            "data.response-column and data.rejected-column"
        )
    if keep.all():
        return data
    level = logging.INFO if keep.mean() > _EXPECTED else logging.WARNING
    message = "%s: %d of %d rows of split %s are incomplete and left out"
    log.log(level, message, settings.name, (~keep).sum(), len(keep), split)
    return data.select(np.flatnonzero(keep))


def _complete(data: "Dataset", settings: DataSettings) -> NDArray[np.bool_]:
    """Which rows have all that they are to have; few of them are Python objects at a time."""

    def check(found: dict[str, list[Any]]) -> list[bool]:
        if settings.format == "messages":
            return [messages.answers(messages.clean(row)) for row in found[settings.text_column]]
        if settings.format == "words":
            return [bool(row) and None not in row for row in found[settings.text_column]]
        if settings.format == "preference":
            named = (settings.text_column, settings.response_column, settings.rejected_column)
            return [pair.is_whole() for pair in preferences.rows_of(found, *named)]
        return [all(text and text.strip() for text in row) for row in zip(*found.values(), strict=True)]

    found = (check(part.with_format("arrow")[:].to_pydict()) for part in parts(data))
    try:
        return np.array([kept for part in found for kept in part], dtype=bool)
    except ConfigError as error:  # of `messages.clean`
        raise ConfigError(f"data.name = {settings.name!r}: {error}") from None


def _subsample(data: "Dataset", most: int) -> "Dataset":
    if most == 0 or most >= len(data):
        return data
    rows = np.random.default_rng(derive(0, "subsample")).choice(len(data), size=most, replace=False)
    return data.select(np.sort(rows))
