"""Who holds what: the partition as a table and as a picture."""

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bora_fl.config import ConfigError, DataSettings
from bora_fl.data.loading import RawData, load_dataset
from bora_fl.data.partitions import classes_or_ids, has_classes, id_column, natural_ids, partition

_MOST_IN_LEGEND = 25
_MOST_NAMED = 12
_MOST_IDS = 4  # that are named below a bar


def partition_picture(
    settings: DataSettings, num_partitions: int, seed: int, path: str | Path, *, numbers: bool = False
) -> Path:
    """Draw one bar per client, stacked by class; by natural id where rows have not one class each, if ids are few.

    Args:
        settings: Which data, and how it is dealt.
        num_partitions: Number of clients.
        seed: Run seed.
        path: Where the PNG file goes; missing folders are made.
        numbers: As in `partition`.

    Returns:
        The path.

    Raises:
        ConfigError: As `partition` does.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    raw = load_dataset(settings)
    parts = partition(settings, num_partitions, seed, numbers=numbers)
    groups, names = _groups(settings, raw, numbers)
    counts = np.stack([np.bincount(groups[rows], minlength=len(names)) for rows in parts])
    figure = Figure(figsize=(min(16.0, 5 + 0.25 * num_partitions), 4), layout="constrained")
    axes = figure.subplots()
    palette = colormaps["tab10" if len(names) <= 10 else "viridis"]
    colors = [palette(i if len(names) <= 10 else i / (len(names) - 1)) for i in range(len(names))]
    for i, (bottom, name) in enumerate(zip(_bottoms(counts), names, strict=True)):
        axes.bar(np.arange(num_partitions), counts[:, i], bottom=bottom, color=colors[i], label=name, width=0.9)
    axes.set(xlabel="client", ylabel="training examples", title=f"{settings.name}, {_how(settings, raw)}, seed {seed}")
    if settings.partition == "natural" and num_partitions <= _MOST_NAMED:
        ids, id_names = natural_ids(settings, raw)
        held = [[id_names[i] for i in np.unique(ids[rows])] for rows in parts]
        axes.set_xticks(range(num_partitions), ["\n".join(_named(found)) for found in held])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 1 < len(names) <= _MOST_IN_LEGEND:
        axes.legend(
            loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False, ncols=1 + len(names) // 14
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    return path


def _groups(settings: DataSettings, raw: RawData, numbers: bool) -> tuple[NDArray[np.int64], list[str]]:
    """Each row's part of its bar, and the names of the parts."""
    with contextlib.suppress(ConfigError):  # a deal that needs no ids may lack them
        groups, names = classes_or_ids(settings, raw, numbers=numbers)
        if has_classes(settings, raw) or len(names) <= _MOST_IN_LEGEND:
            return groups, names
    return np.zeros(len(raw.train), dtype=np.int64), ["examples"]


def _bottoms(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[clients, groups]`` to ``[groups, clients]``: where each piece of a stack begins."""
    return (counts.cumsum(axis=1) - counts).T


def _named(ids: list[str]) -> list[str]:
    """The lines below a bar: few ids by name, of many how many there are."""
    return ids if len(ids) <= _MOST_IDS else [*ids[: _MOST_IDS - 1], f"and {len(ids) - _MOST_IDS + 1} more"]


def _how(settings: DataSettings, raw: RawData) -> str:
    match settings.partition:
        case "dirichlet":
            return f"Dirichlet, alpha {settings.alpha:g}"
        case "pathological":
            return f"{settings.classes_per_client} classes a client"
        case "natural":
            return f"by {id_column(settings, raw)}"
    return settings.partition
