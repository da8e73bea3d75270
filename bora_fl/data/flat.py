"""An array that grows, and goes to the disk where it becomes large."""

import tempfile
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bora_fl.paths import cache_folder

LARGE = 256 << 20  # bytes above which an array lies on the disk
Kind = TypeVar("Kind", bound=np.generic)


class Flat(Generic[Kind]):
    """Values that are appended and then read, in memory or in a file without a name in the cache folder.

    Args:
        dtype: Of the values.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype, self._parts, self._bytes = np.dtype(dtype), [np.empty(0, dtype)], 0
        self._file: Any = None

    def extend(self, values: Iterable[Any]) -> None:
        """Append values."""
        part = np.fromiter(values, self._dtype)
        self._bytes += part.nbytes
        if self._file is None and self._bytes > LARGE:
            folder = cache_folder() / "tokens"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `array` closes it
            np.concatenate(self._parts).tofile(self._file)
            self._parts.clear()
        if self._file is None:
            self._parts.append(part)
        else:
            part.tofile(self._file)

    def array(self) -> NDArray[Kind]:
        """All values, read-only if they are on the disk; nothing can be appended any more."""
        if self._file is None:
            return np.concatenate(self._parts)
        with self._file as file:
            file.flush()
            return np.memmap(file, self._dtype, "r")
