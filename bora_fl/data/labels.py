"""The labels of a data set: a class of each text, any number of them, one for each word, or a number."""

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.config.tasks import MOST_NUMBER

if TYPE_CHECKING:
    from datasets import Dataset


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_number(values: pa.ChunkedArray) -> bool:
    """Whether a column holds numbers that are not all whole."""
    kind = values.type
    if not pa.types.is_floating(kind) and not pa.types.is_decimal(kind):
        return False
    return bool(pa.types.is_floating(_values(values, "").type))


def encode(
    columns: Mapping[str, pa.ChunkedArray], words: Mapping[str, pa.ChunkedArray], feature: Any, name: str
) -> tuple[dict[str, pa.Array], list[str]]:
    """Classes in the place of what the label column holds.

    Strings, whole numbers, booleans and ``ClassLabel`` features become classes in sorted order (a ``ClassLabel``'s own
    order), over all splits. Other numbers stay numbers.

    Args:
        columns: The label column of each split: a label, or a list of labels, a row.
        words: The column of words of each split, where each word has a label; else empty.
        feature: The label column's in `datasets`.
        name: The label column.

    Returns:
        For each split int64 classes, -1 where a ``ClassLabel`` says so; of lists int8 rows of a number for each class,
        1 for those that it has; of words lists of int64, null where a word has no label. And the class names; none
        where the labels are numbers, float64.

    Raises:
        ConfigError: If values are neither classes nor numbers, or not as many as words.
    """
    from datasets import ClassLabel

    lists = {split: values for split, values in columns.items() if is_list(values.type)}
    if lists and len(lists) < len(columns):
        raise ConfigError(f"data.label-column = {name!r}: holds lists in split {next(iter(lists))} alone")
    flat = {split: _values(pc.list_flatten(values) if lists else values, name) for split, values in columns.items()}
    if any(pa.types.is_floating(values.type) for values in flat.values()):
        if lists or isinstance(feature, ClassLabel):
            raise _no_classes(name, "numbers in lists" if lists else "class names in one split and numbers in another")
        return {split: _numbers(values, name) for split, values in flat.items()}, []
    feature = getattr(feature, "feature", feature) if lists else feature
    if isinstance(feature, ClassLabel):
        classes: list[Any] = list(range(len(feature.names)))
        names = list(feature.names)
    else:
        flat = _of_one_type(flat, name)
        classes = sorted({value for labels in flat.values() for value in pc.unique(labels).to_pylist()} - {None})
        names = [str(value) for value in classes]
    codes = {
        split: pc.index_in(values, pa.array(classes, values.type)).cast(pa.int64()).combine_chunks()
        for split, values in flat.items()
    }
    if not lists:
        return codes, names
    if words:
        return {split: _of_words(codes[split], columns[split], words[split], name) for split in codes}, names
    return {split: _of_sets(codes[split], columns[split], len(names)) for split in codes}, names


def _of_words(codes: pa.Array, labels: pa.ChunkedArray, words: pa.ChunkedArray, name: str) -> pa.Array:
    """A list of classes for each list of words."""
    counts, wanted = (pc.list_value_length(column).to_numpy() for column in (labels, words))
    odd = np.flatnonzero((counts != wanted) & ~np.isnan(counts) & ~np.isnan(wanted))
    if len(odd):
        row = int(odd[0])
        raise ConfigError(
            f"data.label-column = {name!r}: row {row + 1} has {wanted[row]:.0f} words and {counts[row]:.0f} labels; "
            "give each word one, null for none"
        )
    return pa.ListArray.from_arrays(_offsets(counts), codes, mask=pa.array(np.isnan(counts)))


def _of_sets(codes: pa.Array, labels: pa.ChunkedArray, num_classes: int) -> pa.Array:
    """For each list of labels a number for each class: 1 for those in it."""
    counts = pc.list_value_length(labels).to_numpy()
    missing = np.isnan(counts)
    sizes = np.where(missing, 0, counts).astype(np.int64)
    known = codes.is_valid().to_numpy(zero_copy_only=False)
    found = np.zeros((len(counts), num_classes), dtype=np.int8)
    found[np.repeat(np.arange(len(counts)), sizes)[known], codes.drop_null().to_numpy()] = 1
    offsets = _offsets(np.full(len(counts), float(num_classes)))
    return pa.ListArray.from_arrays(offsets, pa.array(found.ravel()), mask=pa.array(missing))


def _offsets(counts: np.typing.NDArray[Any]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.nancumsum(counts)]).astype(np.int32))


def _of_one_type(labels: dict[str, pa.ChunkedArray], name: str) -> dict[str, pa.ChunkedArray]:
    """Labels of all splits in one type; that of a split without any is the others'.

    Raises:
        ConfigError: If the splits have labels of several types.
    """
    kinds = {split: values.type for split, values in labels.items() if values.null_count < len(values)}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{kind} in split {split}" for split, kind in kinds.items())
        raise ConfigError(
            f"data.label-column = {name!r}: holds {found}; write the classes alike in all splits, or name another split"
        )
    return {split: values.cast(next(iter(kinds.values()), values.type)) for split, values in labels.items()}


def _numbers(values: pa.ChunkedArray, name: str) -> pa.Array:
    """Numbers as float64."""
    if not pa.types.is_floating(values.type) and not pa.types.is_integer(values.type):
        raise _no_classes(name, f"numbers in one split and {values.type} in another")
    found = values.cast(pa.float64()).combine_chunks()
    if not pc.all(pc.less_equal(pc.abs(found), MOST_NUMBER), min_count=0).as_py():
        raise ConfigError(
            f"data.label-column = {name!r}: holds numbers beyond {MOST_NUMBER:g}, whose squares float32 does not; "
            "scale them"
        )
    return found


def _no_classes(name: str, held: str) -> ConfigError:
    return ConfigError(
        f"data.label-column = {name!r}: holds {held}, which are neither classes nor numbers; name a column of strings "
        "or numbers, or leave it empty for language modelling"
    )


def _values(labels: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Labels as strings, int64, or float64 where not all are whole; booleans stay; anything else is refused."""
    kind = labels.type
    if pa.types.is_boolean(kind):
        return labels
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        labels = labels.cast(pa.string())
        return pc.if_else(pc.equal(pc.utf8_trim_whitespace(labels), ""), None, labels)  # an empty cell of a CSV file
    if pa.types.is_floating(kind):
        labels = pc.if_else(pc.is_nan(labels), None, labels)
    try:
        if pa.types.is_temporal(kind):  # which arrow would cast too
            raise pa.ArrowInvalid(str(kind))
        return labels.cast(pa.int64())
    except pa.ArrowException:
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return labels.cast(pa.float64())
        raise _no_classes(name, f"{kind} values") from None


def numbers(values: pa.ChunkedArray, names: Sequence[str], name: str) -> NDArray[np.float32]:
    """What `encode` made of a column, as numbers: classes that are written as such count as what they say.

    Args:
        values: The column's.
        names: The class names, or none.
        name: The column.

    Raises:
        ConfigError: If a class is no number.
    """
    return _meant(names, name)[np.asarray(values, dtype=np.int64)] if names else np.asarray(values, dtype=np.float32)


def _meant(names: Sequence[str], name: str) -> NDArray[np.float32]:
    """The number that each class name is."""
    try:
        found = np.array([float(label) for label in names], dtype=np.float32)
        if not (np.abs(found) <= MOST_NUMBER).all():
            raise ValueError
    except ValueError:
        held = shorten(", ".join(names), 60, placeholder=" ...")
        raise ConfigError(
            f"data.label-column = {name!r} with model.task = 'regression': holds {held}, which are no numbers; name a "
            "column of numbers, or set model.task to classification"
        ) from None
    return found


def require(train: "Dataset", data: DataSettings, model: ModelSettings, names: Sequence[str] | None) -> None:
    """Refuse data whose labels are not those of the model's task.

    Args:
        train: The training split, as `load_dataset` returns it.
        data: As `RawData.settings` has them.
        model: The task.
        names: The class names; empty where the labels are numbers, None without labels.

    Raises:
        ConfigError: If it has no labels, others than the task is for, fewer than two classes, or responses beside them.
    """
    at = f"with model.task = {model.task!r}"
    if not model.kind.head:
        if data.format == "words":
            raise ConfigError(
                f"data.text-column = {data.text_column!r} {at}: it holds lists of words; set model.task to "
                "token-classification, or name a column of texts"
            )
        return
    if data.format == "preference":
        raise ConfigError(
            f"data.format = 'preference' {at}: pairs of responses are for causal-lm; set model.task to causal-lm, or "
            "data.format to text"
        )
    if data.response_column:
        raise ConfigError(
            f"data.response-column = {data.response_column!r} {at}: responses are for causal-lm; set model.task to "
            "causal-lm or leave data.response-column empty"
        )
    if data.label_column not in train.column_names or data.format not in ("text", "words"):
        raise ConfigError(
            f"data.label-column = {data.label_column!r} {at}: columns are {', '.join(train.column_names)}; name the "
            "column of the classes, or set model.task to causal-lm"
        )
    lists = is_list(train.data.schema.field(data.label_column).type)
    if model.kind.number and not lists and data.format != "words":
        _meant(names or (), data.label_column)
        return
    found = "regression" if not names else "multi-label" if lists else "classification"
    found = "token-classification" if data.format == "words" else found
    if found != model.task:
        held = {
            "token-classification": "a class of each word",
            "multi-label": "a list of classes for each text",
            "classification": "one class of each text",
            "regression": "numbers",
        }
        raise ConfigError(
            f"data.label-column = {data.label_column!r} {at}: it holds {held[found]}; set model.task to {found}, or "
            "name another column"
        )
    if len(names or ()) < 2:
        raise ConfigError(
            f"data.label-column = {data.label_column!r}: holds {len(names or ())} class(es), {names}; name a column "
            "with two or more"
        )
