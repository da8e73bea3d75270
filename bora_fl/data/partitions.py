"""Deal the training examples to clients with flwr-datasets' partitioners; the same deal in every process for a seed."""

import contextlib
import io
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bora_fl.config import ConfigError, DataSettings
from bora_fl.data import labels
from bora_fl.data.columns import IDS, num_missing, usual
from bora_fl.data.labels import is_list
from bora_fl.data.loading import RawData, column, load_dataset
from bora_fl.seeds import derive

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

_NUMBER_CLASSES = 10  # that rows with a number are dealt by
_LEAST = 2  # examples a client gets in a Dirichlet split: one to train on, one to hold out


def partition(
    settings: DataSettings, num_partitions: int, seed: int, *, numbers: bool = False
) -> list[NDArray[np.int64]]:
    """Deal the rows of the training split to clients.

    - ``iid``: equal parts of a shuffled order. ``linear``, ``square``, ``exponential``: of a shuffled order, client i
      gets a part proportional to i + 1, (i + 1)², exp(i + 1).
    - ``dirichlet``: each class is dealt by shares drawn from Dirichlet(alpha); drawn again, up to
      ten times, while a client gets fewer than two examples.
    - ``pathological``: each client holds `classes_per_client` classes, the first of them in turn so that none is left
      out while there are as many clients as classes.
    - ``natural``: client i holds the i-th id (sorted) of the column that `id_column` names. With fewer clients than ids
      every client holds whole ids, dealt from the largest to whoever has least.
    - ``local``: nothing is dealt; a site's rows are all its own.

    Where a row has no class, or several, ``dirichlet`` and ``pathological`` deal the values of `partition_by` instead;
    where it has a number, tenths of the rows in its order.

    Args:
        settings: Which data, and how it is dealt.
        num_partitions: Number of clients.
        seed: Run seed.
        numbers: Whether the labels are numbers, although they may be whole ones.

    Returns:
        For each client the rows it holds, int64; no client without rows, and no row twice unless ``local``.

    Raises:
        ConfigError: If the data cannot be dealt so; the message names key, value and remedy.
    """
    raw = load_dataset(settings)
    rows = len(raw.train)
    if num_partitions < 1:
        raise ConfigError(f"data.num-partitions = {num_partitions}: there must be at least 1 client")
    if settings.partition == "local":
        return [np.arange(rows)] * num_partitions
    if num_partitions > rows:
        raise ConfigError(
            f"data.num-partitions = {num_partitions}: the training split has {rows} examples; use fewer clients"
        )
    if settings.partition == "natural":
        return _deal(_partitioner(settings, num_partitions, rows, seed), _owners(settings, raw, num_partitions))
    groups = np.zeros(rows, dtype=np.int64)
    if settings.partition in ("dirichlet", "pathological"):
        groups, _ = classes_or_ids(settings, raw, numbers=numbers)
    held = len(np.unique(groups))
    if settings.partition == "pathological" and settings.classes_per_client > held:
        raise ConfigError(
            f"data.classes-per-client = {settings.classes_per_client}: the training split has {held} classes; use at "
            "most that"
        )
    # Partitioners by size cut consecutive rows, and files are seldom in random order.
    order = np.random.default_rng(derive(seed, "partition")).permutation(rows)
    try:
        return [order[part] for part in _deal(_partitioner(settings, num_partitions, rows, seed), groups[order])]
    except ValueError as error:
        raise ConfigError(_refusal(settings, num_partitions, rows)) from error


def id_column(settings: DataSettings, raw: RawData) -> str:
    """The column of the natural ids, which may be missing: `partition_by`, or the first with a usual name of an id.

    The latter where `partition_by` has its default and there is no such column. A column of labels or texts is taken
    only if it is named.
    """
    name, read = settings.partition_by, raw.settings
    if name != DataSettings().partition_by or name in raw.train.column_names:
        return name
    learned = {read.text_column, read.response_column, read.context_column, read.rejected_column}
    learned |= set() if raw.label_names is None else {read.label_column}
    return usual(IDS, [column for column in raw.train.column_names if column not in learned]) or name


def natural_ids(settings: DataSettings, raw: RawData) -> tuple[NDArray[np.int64], list[str]]:
    """Each training row's natural id as a position in the sorted list of ids, and that list.

    Raises:
        ConfigError: If there is no such column or a row lacks an id.
    """
    name = id_column(settings, raw)
    if name not in raw.train.column_names:
        raise ConfigError(
            f"data.partition-by = {name!r} with data.partition = {settings.partition!r}: columns are "
            f"{', '.join(raw.train.column_names)}; name the column of the ids, or set data.partition to iid"
        )
    values = column(raw.train, name)
    if missing := num_missing(values):
        raise ConfigError(
            f"data.partition-by = {name!r}: {missing} of {len(values)} rows have no id; fill them in or name another "
            "column"
        )
    if pa.types.is_nested(values.type):
        raise ConfigError(
            f"data.partition-by = {name!r}: holds {values.type}, which is no id; name a column of strings or numbers"
        )
    if not pa.types.is_primitive(values.type):
        values = values.cast(pa.string())
    unique = pc.unique(values)
    ids = unique.take(pc.sort_indices(unique))
    return pc.index_in(values, value_set=ids).to_numpy().astype(np.int64), [str(i) for i in ids.to_pylist()]


def classes_or_ids(
    settings: DataSettings, raw: RawData, *, numbers: bool = False
) -> tuple[NDArray[np.int64], list[str]]:
    """Each training row's class and the class names; natural ids where a row has no class, or several.

    Of numbers each tenth of the rows, in their order, is a class; equal numbers are of one class.
    """
    if raw.label_names is None or not has_classes(settings, raw):
        return natural_ids(settings, raw)
    held = column(raw.train, settings.label_column)
    if raw.label_names and not numbers:
        return held.to_numpy().astype(np.int64), raw.label_names
    values = labels.numbers(held, raw.label_names, settings.label_column)
    bounds = np.unique(np.quantile(values, np.arange(1, _NUMBER_CLASSES) / _NUMBER_CLASSES, method="lower"))
    names = [f"up to {bound:.4g}" for bound in bounds] + [f"above {bounds[-1]:.4g}"]
    found, groups = np.unique(np.searchsorted(bounds, values), return_inverse=True)
    return groups.astype(np.int64), [names[k] for k in found]


def has_classes(settings: DataSettings, raw: RawData) -> bool:
    """Whether each training row has one class, or one number."""
    return raw.label_names is not None and not is_list(column(raw.train, settings.label_column).type)


def _owners(settings: DataSettings, raw: RawData, num_partitions: int) -> NDArray[np.int64]:
    """The client of each row: whole ids, one each in sorted order, or several each where there are fewer clients."""
    rows, ids = natural_ids(settings, raw)
    if num_partitions > len(ids):
        some = ", ".join(ids[:8]) + (", …" if len(ids) > 8 else "")
        raise ConfigError(
            f"data.partition-by = {id_column(settings, raw)!r}: {len(ids)} ids ({some}) cannot be dealt to "
            f"{num_partitions} clients; use at most {len(ids)} clients (data.num-partitions or the federation's size), "
            "or set data.partition to dirichlet or iid"
        )
    owner = np.arange(len(ids))
    if num_partitions < len(ids):
        sizes = np.bincount(rows, minlength=len(ids))
        loads = np.zeros(num_partitions, dtype=np.int64)
        for i in np.argsort(-sizes, kind="stable"):
            owner[i] = loads.argmin()
            loads[owner[i]] += sizes[i]
    return owner[rows]


def _partitioner(settings: DataSettings, num_partitions: int, rows: int, seed: int) -> "Partitioner":
    from flwr_datasets import partitioner as kinds

    number = derive(seed, "partitioner")
    match settings.partition:
        case "natural":
            return kinds.NaturalIdPartitioner(partition_by="group")
        case "dirichlet":
            least = min(_LEAST, rows // num_partitions)
            return kinds.DirichletPartitioner(
                num_partitions, "group", settings.alpha, min_partition_size=least, shuffle=False, seed=number
            )
        case "pathological":
            return kinds.PathologicalPartitioner(
                num_partitions, "group", settings.classes_per_client, "first-deterministic", shuffle=False, seed=number
            )
        case "iid":
            return kinds.IidPartitioner(num_partitions)
        case "linear":
            return kinds.LinearPartitioner(num_partitions)
        case "square":
            return kinds.SquarePartitioner(num_partitions)
        case "exponential":
            return kinds.ExponentialPartitioner(num_partitions)


def _deal(partitioner: "Partitioner", groups: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    from datasets import Dataset

    class RowNumbers(Dataset):  # type: ignore[misc]
        """Answers a selection with the rows selected: a Dataset would hash and copy them for every client."""

        def select(self, indices: Iterable[int], **_: Any) -> NDArray[np.int64]:
            return np.fromiter(indices, np.int64)

    partitioner.dataset = RowNumbers.from_dict({"group": groups})
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing else turns off
        warnings.simplefilter("ignore")
        return [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]


def _refusal(settings: DataSettings, num_partitions: int, rows: int) -> str:
    if settings.partition == "dirichlet":
        return (
            f"data.alpha = {settings.alpha}: ten draws left one of {num_partitions} clients with next to none of "
            f"{rows} examples; use a larger alpha or fewer clients"
        )
    if settings.partition == "pathological":
        return (
            f"data.classes-per-client = {settings.classes_per_client}: a class has fewer examples than clients that "
            f"should hold it; use fewer than {num_partitions} clients or fewer classes per client"
        )
    return (
        f"data.partition = {settings.partition!r}: the smallest of {num_partitions} clients would get none of {rows} "
        "examples; use fewer clients or a milder skew (linear)"
    )
