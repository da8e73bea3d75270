"""What each node holds of the state and of the base deltas, and the records that bring it up to date.

A node is known to hold what its last accepted train reply was trained on; one whose reply is lost or rejected, or that
joins, is sent everything. The message carries a digest of what it leaves out, so that a client that has lost its memory
refuses (``state-missing``) and is sent everything with the next round.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from flwr.app import ArrayRecord
from torch import Tensor

from bora_fl.wire.deltas import difference, digest, not_whole
from bora_fl.wire.records import fold_record_name, part_of, to_arrays
from bora_fl.wire.schema import STATE


class Parcel(NamedTuple):
    """What a node is sent.

    Attributes:
        node: Its id.
        records: The state, and the base deltas that the node lacks, one record a version. Nodes that need the same
            share their records.
        base: Digest of the entries of the state that are not whole in the message; empty if all are.
    """

    node: int
    records: Mapping[str, ArrayRecord]
    base: str


class Downlink:
    """Remembers what nodes hold, in a process; after a resumption it knows nothing, and sends everything."""

    def __init__(self) -> None:
        self._folds: dict[int, int] = {}
        self._states: dict[int, Mapping[str, Tensor]] = {}
        self._expected: tuple[frozenset[int], Mapping[str, Tensor]] = (frozenset(), {})
        self._fold_records: dict[int, ArrayRecord] = {}

    def parcels(
        self,
        nodes: Iterable[int],
        flat: Mapping[str, Tensor],
        whole: ArrayRecord,
        folds: Sequence[Mapping[str, Tensor]],
    ) -> Iterator[Parcel]:
        """What each node needs to have a state.

        Args:
            nodes: Node ids.
            flat: The state.
            whole: The same as a record.
            folds: Every base delta so far.
        """
        nodes = list(nodes)
        lacking = {v for node in nodes for v in range(self._folds.get(node, 0) + 1, len(folds) + 1)}
        self._fold_records = {
            v: self._fold_records.get(v) or to_arrays({f"{v}/{name}": t for name, t in folds[v - 1].items()})
            for v in sorted(lacking)
        }
        made: dict[int, tuple[ArrayRecord, str]] = {}
        for node in nodes:
            held = self._states.get(node)
            if held and id(held) not in made:
                sent = difference(flat, held)
                rest = not_whole(flat, sent)
                made[id(held)] = (to_arrays(sent), digest(rest)) if rest else (whole, "")
            state, base = made[id(held)] if held else (whole, "")
            first = self._folds.get(node, 0) + 1
            records = {fold_record_name(v): self._fold_records[v] for v in range(first, len(folds) + 1)}
            yield Parcel(node, {STATE: state, **records}, base)

    def expect(self, nodes: Iterable[int], flat: Mapping[str, Tensor], keeps: Collection[str]) -> None:
        """Nodes were asked to train on a state, and to keep these parts of it."""
        kept = {name: tensor for name, tensor in flat.items() if part_of(name) in keeps}
        self._expected = (frozenset(nodes), kept)

    def settle(self, accepted: Collection[int], folds: Mapping[int, int]) -> None:
        """Replies came in.

        Args:
            accepted: The nodes whose replies were accepted; what the others of the round hold is forgotten.
            folds: Node to the newest base delta that it holds, where that is known.
        """
        asked, kept = self._expected
        self.forget(asked)
        for node in asked:
            if kept and node in accepted:
                self._states[node] = kept
        self._folds |= folds

    def forget(self, nodes: Iterable[int], *, folds: bool = False) -> None:
        """Send these nodes the whole state next time, and every base delta if asked to."""
        for node in nodes:
            self._states.pop(node, None)
            if folds:
                self._folds.pop(node, None)
