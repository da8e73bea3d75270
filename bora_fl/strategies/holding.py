"""A round's updates until they are merged: in memory, and beyond a budget in a file that has no name.

A merge takes them layer by layer in the order of the clients' ids, whatever order they came in, so that all clients'
updates of a few layers are in memory at once, and never all of all layers.
"""

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors
from bora_fl.state import PARTS, AdapterState, ClientUpdate, flatten
from bora_fl.strategies.observer import RunFailedError

Value = TypeVar("Value")


class _File:
    """A file without a name, which is gone with the last tensor that is stored in it."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self.descriptor, self.end = os.dup(file.fileno()), 0
        weakref.finalize(self, os.close, self.descriptor)

    def append(self, data: memoryview) -> int:
        """Write all of it, and return where it begins."""
        start = self.end
        while data:
            written = os.pwrite(self.descriptor, data, self.end)
            data, self.end = data[written:], self.end + written
        return start


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file."""

    file: _File
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        if not size:
            return torch.empty(self.shape, dtype=self.dtype)
        data, filled = bytearray(size), 0
        while filled < size:
            count = os.preadv(self.file.descriptor, [memoryview(data)[filled:]], self.offset + filled)
            if not count:
                raise RunFailedError("a reply that waits for its merge is cut off; is the temporary folder whole?")
            filled += count
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


Piece = Tensor | _Stored


class _Lazy(Mapping[str, Value], Generic[Value]):
    """Values whose tensors are read each time a value is asked for.

    Args:
        pieces: Name to the tensors of a value, of which any may be in a file.
        make: A value from its name and tensors.
    """

    def __init__(self, pieces: Mapping[str, Sequence[Piece]], make: Callable[[str, Sequence[Tensor]], Value]) -> None:
        self.pieces, self._make = pieces, make

    def __getitem__(self, name: str) -> Value:
        return self._make(name, [p.read() if isinstance(p, _Stored) else p for p in self.pieces[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


class StoredState(AdapterState):
    """A state whose tensors are read from a file when they are asked for."""

    def rank(self, layer: str) -> int:
        """See `AdapterState.rank`; nothing is read for it."""
        return cast(_Lazy[BlockFactors], self.layers).pieces[layer][PARTS.index("A")].shape[0]


class Held:
    """Holds updates.

    Args:
        memory_bytes: What they may take in memory; those for which no room is left go to the file.
        sent: What the clients were sent: tensors of it in an update take no room.
    """

    def __init__(self, memory_bytes: int, sent: AdapterState) -> None:
        self._left, self._sent = memory_bytes, flatten(sent)
        self._remedy = ", or raise strategy.memory-mb" if memory_bytes else ""
        self._known = {id(tensor) for tensor in self._sent.values()}
        self._file: _File | None = None

    def hold(self, update: ClientUpdate) -> ClientUpdate:
        """The update, to be used in the place of the given one.

        Raises:
            RunFailedError: If the file cannot be written.
        """
        factors = [getattr(f, part) for f in update.state.layers.values() for part in PARTS]
        tensors = [*factors, *update.state.tensors.values(), *update.grams.values()]
        size = sum(t.numel() * t.element_size() for t in tensors if id(t) not in self._known)
        if size <= self._left:
            self._left -= size
            return update
        try:
            return self._stored(update)
        except OSError as error:
            raise RunFailedError(
                f"a reply cannot wait in {tempfile.tempdir or 'a file'}: {error}; free space there, name another "
                f"folder in TMPDIR{self._remedy}"
            ) from error

    def _stored(self, update: ClientUpdate) -> ClientUpdate:
        scalings = {name: factors.scaling for name, factors in update.state.layers.items()}
        layers = {
            name: [self._store(getattr(factors, part)) for part in PARTS]
            for name, factors in update.state.layers.items()
        }
        state = StoredState(
            _Lazy(layers, lambda name, parts: BlockFactors(parts[0], parts[1], parts[2], scalings[name])),
            _Lazy({name: [self._store(t)] for name, t in update.state.tensors.items()}, _only),
        )
        grams = _Lazy({name: [self._store(t)] for name, t in update.grams.items()}, _only)
        return replace(update, state=state, grams=grams)

    def _store(self, tensor: Tensor) -> Piece:
        if id(tensor) in self._known:
            return tensor
        self._file = self._file or _File()
        flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _Stored(self._file, self._file.append(memoryview(flat)), tensor.shape, tensor.dtype)


def _only(name: str, parts: Sequence[Tensor]) -> Tensor:
    return parts[0]
