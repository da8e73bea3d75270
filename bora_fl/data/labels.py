"""The labels of a data set as class numbers: one for each text, any number of them, or one for each word."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bora_fl.config import ConfigError, DataSettings, ModelSettings

if TYPE_CHECKING:
    from datasets import Dataset


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def encode(
    columns: Mapping[str, pa.ChunkedArray], words: Mapping[str, pa.ChunkedArray], feature: Any, name: str
) -> tuple[dict[str, pa.Array], list[str]]:
    """Classes in the place of what the label column holds.

    Strings, whole numbers, booleans and ``ClassLabel`` features become classes in sorted order (a ``ClassLabel``'s own
    order), over all splits.

    Args:
        columns: The label column of each split: a label, or a list of labels, a row.
        words: The column of words of each split, where each word has a label; else empty.
        feature: The label column's in `datasets`.
        name: The label column.

    Returns:
        For each split int64 classes, -1 where a ``ClassLabel`` says so; of lists int8 rows of a number for each class,
        1 for those that it has; of words lists of int64, null where a word has no label. And the class names.

    Raises:
        ConfigError: If values are no classes, fewer than two, or not as many as words.
    """
    from datasets import ClassLabel

    lists = {split: values for split, values in columns.items() if is_list(values.type)}
    if lists and len(lists) < len(columns):
        raise ConfigError(f"data.label-column = {name!r}: holds lists in split {next(iter(lists))} alone")
    flat = {
        split: _whole_numbers(pc.list_flatten(values) if lists else values, name) for split, values in columns.items()
    }
    feature = getattr(feature, "feature", feature) if lists else feature
    if isinstance(feature, ClassLabel):
        classes: list[Any] = list(range(len(feature.names)))
        names = list(feature.names)
    else:
        flat = _of_one_type(flat, name)
        classes = sorted({value for labels in flat.values() for value in pc.unique(labels).to_pylist()} - {None})
        names = [str(value) for value in classes]
    if len(classes) < 2:
        raise ConfigError(
            f"data.label-column = {name!r}: holds {len(classes)} class(es), {names}; name a column with two or more"
        )
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


def _whole_numbers(labels: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Labels as strings or int64; booleans stay; anything else is refused."""
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
        raise ConfigError(
            f"data.label-column = {name!r}: holds {kind} values that are not classes; name a column of strings or "
            "whole numbers, or leave it empty for language modelling"
        ) from None


def require(train: "Dataset", data: DataSettings, model: ModelSettings) -> None:
    """Refuse data whose labels are not those of the model's task.

    Args:
        train: The training split, as `load_dataset` returns it.
        data: As `RawData.settings` has them.
        model: The task.

    Raises:
        ConfigError: If it has no labels, others than the task is for, or responses beside them.
    """
    at = f"with model.task = {model.task!r}"
    if not model.kind.classes:
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
    found = "token-classification" if data.format == "words" else "multi-label" if lists else "classification"
    if found != model.task:
        held = {
            "token-classification": "a class of each word",
            "multi-label": "a list of classes for each text",
            "classification": "one class of each text",
        }
        raise ConfigError(
            f"data.label-column = {data.label_column!r} {at}: it holds {held[found]}; set model.task to {found}, or "
            "name another column"
        )
