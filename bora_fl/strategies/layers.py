"""The layers of a merge, several at once, as many as the threads and the memory allow."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_COPIES = 7  # a merge works on float64 copies of what it reads: about so many times the updates' float32 bytes


def each_layer(
    work: Callable[[str], Result], names: Sequence[str], update_bytes: int, memory_bytes: int
) -> dict[str, Result]:
    """Do the work of every layer, in their order or several at once.

    Args:
        work: From a layer's name to its result; it must be safe to call from several threads.
        names: The layers.
        update_bytes: Bytes of all clients' updates of a layer.
        memory_bytes: What layers at work may take in all; one is always worked on.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(names), max(1, memory_bytes // max(1, _COPIES * update_bytes)))
    if workers < 2:
        return {name: work(name) for name in names}
    torch.set_num_threads(1)  # each layer on one core
    try:
        with ThreadPoolExecutor(workers) as pool:
            return dict(zip(names, pool.map(work, names), strict=True))
    finally:
        torch.set_num_threads(threads)
