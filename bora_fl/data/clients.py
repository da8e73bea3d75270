"""What a client or the server works on: tokenized once per process, shared by every virtual client that runs there."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.data.encoded import Encoded
from bora_fl.data.loading import load_dataset, loading_key
from bora_fl.data.packing import pack
from bora_fl.data.partitions import partition
from bora_fl.data.tokenizing import tokenize
from bora_fl.seeds import derive

_KEPT = 4
_loads = 0
_lock = threading.RLock()
_encoded: OrderedDict[tuple[Any, ...], Encoded] = OrderedDict()
_dealt: OrderedDict[tuple[Any, ...], list[NDArray[np.int64]]] = OrderedDict()


@dataclass(frozen=True)
class ClientData:
    """One client's examples; no example is in both parts.

    Attributes:
        train: What it trains on; at least one example.
        evaluation: What it holds out; may be empty.
    """

    train: Encoded
    evaluation: Encoded


def loads() -> int:
    """How many splits this process has tokenized."""
    return _loads


def client_data(
    data: DataSettings, model: ModelSettings, tokenizer: Any, partition_id: int, num_partitions: int, seed: int
) -> ClientData:
    """One client's share of the training split, with its own evaluation part held out.

    Args:
        data: Which data, and how it is dealt.
        model: Task and `max_length`.
        tokenizer: The base model's tokenizer.
        partition_id: Which client, 0 … num_partitions - 1.
        num_partitions: Number of clients.
        seed: Run seed; it decides the partition and what is held out.

    Returns:
        Both parts. `evaluation_fraction` of the examples are held out, rounded to nearest, at least one if the fraction
        is not 0 and there are two or more.

    Raises:
        ConfigError: As `load_dataset` and `partition` do, or for a partition id out of range.
        FetchError: If an embedded data set cannot be made here.
    """
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(
            f"partition-id = {partition_id} with num-partitions = {num_partitions}: ids run from 0 to "
            f"{num_partitions - 1}"
        )
    with _lock:
        key = (loading_key(data), data.model_dump_json(), model.kind.number, num_partitions, seed)
        if key not in _dealt:
            _remember(_dealt, key, partition(data, num_partitions, seed, numbers=model.kind.number))
        rows = _dealt[key][partition_id]
        examples = _split("train", data, model, tokenizer)
    shuffled = np.random.default_rng(derive(seed, "hold out", partition_id)).permutation(rows)
    held = _held_out(len(rows), data.evaluation_fraction)
    train = examples.select(shuffled[held:])
    return ClientData(pack(train) if data.packing else train, examples.select(shuffled[:held]))


def test_data(data: DataSettings, model: ModelSettings, tokenizer: Any) -> Encoded | None:
    """The server's central test set, or None if the settings name none."""
    if not data.test_split or load_dataset(data).test is None:
        return None
    with _lock:
        return _split("test", data, model, tokenizer)


def draw_batches(
    num_examples: int,
    batch_size: int,
    num_batches: int,
    generator: np.random.Generator,
    lengths: NDArray[np.int64] | None = None,
    bucket: int = 1,
) -> Iterator[NDArray[np.int64]]:
    """Batches of positions from reshuffled passes over the examples.

    Each pass deals every example exactly once, in a new order; its last batch has what is left, so it may be smaller.
    The sequence depends on the generator's state and the lengths alone, and a longer one begins with the shorter one.

    With ``bucket > 1`` every run of ``bucket`` full batches is sorted by length, cut anew and put in a random order:
    a batch then holds examples of about one length, and little of it is padding.

    Args:
        num_examples: Examples there are.
        batch_size: Positions in a full batch.
        num_batches: Batches to draw.
        generator: Source of the orders.
        lengths: ``[num_examples]``, tokens of each example; needed for ``bucket > 1``.
        bucket: Batches that are sorted together.

    Raises:
        ValueError: If there is nothing to draw from.
    """
    if num_examples < 1 or batch_size < 1:
        raise ValueError(f"batches of {batch_size} from {num_examples} examples: both must be at least 1")
    drawn = 0
    while drawn < num_batches:
        order = generator.permutation(num_examples)
        if lengths is not None and bucket > 1:
            order = _bucketed(order, lengths, batch_size, bucket, generator)
        for start in range(0, num_examples, batch_size):
            if drawn == num_batches:
                return
            yield order[start : start + batch_size]
            drawn += 1


def _bucketed(
    order: NDArray[np.int64], lengths: NDArray[np.int64], size: int, bucket: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    order = order.copy()
    full = len(order) // size
    for first in range(0, full, bucket):
        part = order[first * size : min(first + bucket, full) * size]
        batches = part[np.argsort(lengths[part], kind="stable")].reshape(-1, size)
        part[:] = generator.permutation(batches).ravel()
    return order


def _held_out(num_examples: int, fraction: float) -> int:
    if fraction == 0 or num_examples < 2:
        return 0
    return min(max(round(num_examples * fraction), 1), num_examples - 1)


def _split(which: Literal["train", "test"], data: DataSettings, model: ModelSettings, tokenizer: Any) -> Encoded:
    global _loads
    vocabulary = (
        type(tokenizer).__name__,
        tokenizer.name_or_path,
        len(tokenizer),
        getattr(tokenizer, "chat_template", None),
    )
    key = (which, loading_key(data), model.name, model.revision, model.task, model.max_length, *vocabulary)
    if key not in _encoded:
        raw = load_dataset(data)
        split = raw.train if which == "train" else raw.test
        assert split is not None
        _remember(_encoded, key, tokenize(split, raw.settings, model, tokenizer, raw.label_names))
        _loads += 1
    _encoded.move_to_end(key)
    return _encoded[key]


def _remember(cache: OrderedDict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    cache[key] = value
    while len(cache) > _KEPT:
        cache.popitem(last=False)
