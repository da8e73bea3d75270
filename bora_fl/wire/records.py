"""Adapter states, instructions and replies as Flower records, versioned."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import safetensors.numpy
import safetensors.torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from torch import Tensor

from bora_fl.paths import path_part
from bora_fl.state import AdapterState, flatten
from bora_fl.wire.deltas import GAPS, VALUES, apply, difference, digest, not_whole
from bora_fl.wire.refusals import Code, Refused, refuse_as
from bora_fl.wire.schema import FOLDS, INSTRUCTION, METRICS, REPLY, SCHEMA, STATE
from bora_fl.wire.sparsity import By

PACKED, KEPT = "safetensors", "received-state"


@dataclass(frozen=True)
class Instruction:
    """What a client is to do in a round.

    Attributes:
        round: Counted from 1.
        run_id: The run, so that a site keeps what belongs to it apart.
        trains: Parts that train, of A, sigma, B, tensors.
        shares: Parts that the reply holds.
        evaluate: Evaluate the received adapter on the held-out part and report it in the reply.
        fold_version: Version of the frozen weights to train on; 0 is the base model.
        class_shares: Each class's share of all clients' examples; empty where the server does not know them.
        sparsity: Share of the update that is sent; 1 is all.
        sparsity_by: What that is a share of: entries, or components.
        gram: What of the Gram matrices of the layers' inputs is sent; empty for nothing.
        keeps: Parts of the state that the client keeps, since the next message may leave out what did not change.
        base: Digest of the entries that are not whole in this message, and are completed from what the client keeps;
            empty if all are whole.
        feedback: First round of which what the codec lost is added to later updates: one after the last that was taken
            back. 0 where none is added, nor kept.
    """

    round: int
    run_id: str
    trains: frozenset[str]
    shares: frozenset[str]
    evaluate: bool
    fold_version: int = 0
    sparsity: float = 1.0
    class_shares: tuple[float, ...] = ()
    sparsity_by: By = "entries"
    gram: Literal["", "blocks", "diagonal"] = ""
    keeps: frozenset[str] = frozenset()
    base: str = ""
    feedback: int = 1

    def record(self) -> ConfigRecord:
        """As a Flower record."""
        return ConfigRecord(
            {
                "schema": SCHEMA,
                "round": self.round,
                "run-id": self.run_id,
                "trains": sorted(self.trains),
                "shares": sorted(self.shares),
                "evaluate": self.evaluate,
                "fold-version": self.fold_version,
                "sparsity": self.sparsity,
                "class-shares": list(self.class_shares),
                "sparsity-by": self.sparsity_by,
                "gram": self.gram,
                "keeps": sorted(self.keeps),
                "feedback": self.feedback,
                "base": self.base,
            }
        )

    @classmethod
    def read(cls, content: RecordDict) -> "Instruction":
        """From a received message.

        Raises:
            Refused: If the message speaks another version of the schema.
            ValueError: If its run id is no name for a folder.
        """
        values = content.config_records.get(INSTRUCTION, ConfigRecord())
        if values.get("schema") != SCHEMA:
            raise Refused(
                Code.SCHEMA_MISMATCH,
                f"the server speaks wire schema {values.get('schema')!r}, this site {SCHEMA}: "
                "install the same bora-fl version on the server and on every site",
            )
        return cls(
            round=int(values["round"]),  # type: ignore[arg-type]
            run_id=path_part(str(values["run-id"])),
            trains=frozenset(values["trains"]),  # type: ignore[arg-type]
            shares=frozenset(values["shares"]),  # type: ignore[arg-type]
            evaluate=bool(values["evaluate"]),
            fold_version=int(values["fold-version"]),  # type: ignore[arg-type]
            sparsity=float(values["sparsity"]),  # type: ignore[arg-type]
            class_shares=tuple(values["class-shares"]),  # type: ignore[arg-type]
            sparsity_by=cast(By, values["sparsity-by"]),
            gram=cast(Any, values["gram"]),
            keeps=frozenset(values["keeps"]),  # type: ignore[arg-type]
            base=str(values["base"]),
            feedback=int(values["feedback"]),  # type: ignore[arg-type]
        )


def to_arrays(flat: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as a Flower record: one array, whose bytes are a safetensors file.

    Flower stores, signs and requests every array as two objects of its own, on each of the four ways of a round; for
    the 50 tensors of a small adapter that costs more than its training. Half precision travels as float32.
    """
    wide = {name: _wide(tensor.detach()).cpu().contiguous().numpy() for name, tensor in flat.items()}
    data = safetensors.numpy.save(wide)
    return ArrayRecord({PACKED: Array(dtype="uint8", shape=(len(data),), stype=PACKED, data=data)})


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """The inverse of `to_arrays`; nothing is unpickled.

    Raises:
        ValueError: If it is not such a record.
        SafetensorError: If the bytes are not a safetensors file.
    """
    if list(record) != [PACKED] or record[PACKED].stype != PACKED:
        raise ValueError(f"expected one array {PACKED!r}, found {', '.join(map(repr, record)) or 'none'}"[:500])
    flat: dict[str, Tensor] = safetensors.torch.load(record[PACKED].data)
    return flat


def content_digest(content: RecordDict) -> str:
    """SHA-256 of a message's content, the same where it is sent and where it is received."""
    result = hashlib.sha256()
    for name in sorted(content):
        proto = recorddict_to_proto(RecordDict({name: content[name]}))
        result.update(proto.SerializeToString(deterministic=True))
    return result.hexdigest()


def reply_digests(replies: Iterable[Message], question: str = "") -> dict[str, str]:
    """Node, and the question where a node may be asked more than one in a round, to the digest of its reply."""
    name = f" {question}" if question else ""
    return {f"{m.metadata.src_node_id}{name}": content_digest(m.content) for m in replies if m.has_content()}


def shared(flat: Mapping[str, Tensor], parts: frozenset[str]) -> dict[str, Tensor]:
    """The entries of a flattened state that belong to the given parts (of A, sigma, B, tensors)."""
    return {name: t for name, t in flat.items() if part_of(name) in parts}


def part_of(name: str) -> str:
    """Which part an entry of a flattened state is: A, sigma, B, scaling or tensors."""
    return "tensors" if name.startswith("tensors/") else name.rpartition("/")[2]


def read_message(content: RecordDict, memory: RecordDict) -> tuple[Instruction, dict[str, Tensor]]:
    """What a message asks for, and the flattened state that it carries, completed from what the client keeps.

    Raises:
        Refused: If it cannot be understood, or leaves out what is not in the client's memory.
    """
    with refuse_as(Code.MESSAGE_INVALID):
        instruction = Instruction.read(content)
        return instruction, _complete(content, instruction.base, memory)


def keep(memory: RecordDict, sent: Mapping[str, Tensor], parts: frozenset[str]) -> None:
    """Keep these parts of a received state, and nothing of an earlier one, for messages that leave them out."""
    memory.pop(KEPT, None)
    if kept := shared(sent, parts):
        memory[KEPT] = to_arrays(kept)


def _complete(content: RecordDict, base: str, memory: RecordDict) -> dict[str, Tensor]:
    if STATE not in content.array_records:
        raise ValueError("the message carries no adapter state")
    sent = from_arrays(content.array_records[STATE])
    if not base:
        return sent
    held = from_arrays(memory.array_records[KEPT]) if KEPT in memory.array_records else {}
    changed = {name.rpartition("@")[0] for name in sent if name.endswith((GAPS, VALUES))}
    if not changed <= held.keys():
        raise Refused(Code.STATE_MISSING)
    flat = held | apply(sent, held)
    if digest(not_whole(flat, sent)) != base:
        raise Refused(Code.STATE_MISSING)
    return flat


def fold_record_name(version: int) -> str:
    """The name of the record of a message that holds a base delta."""
    return f"{FOLDS}-{version}"


def folds_of(content: RecordDict) -> dict[str, Tensor]:
    """The base deltas that a message carries, ``<version>/<layer>/<part>`` to tensor."""
    folds: dict[str, Tensor] = {}
    for name, record in content.array_records.items():
        if name.startswith(f"{FOLDS}-"):
            folds |= from_arrays(record)
    return folds


Pack = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def plain(entries: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are."""
    return {**entries}


def changes(entries: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each tensor the entries that changed, bit for bit, where that is smaller."""
    return difference(entries, sent, omit=False)


def holds_every_factor(state: AdapterState, sent: AdapterState) -> bool:
    """Whether a reply holds every factor, shared or not: its rank is not that of what was sent."""
    flat, reference = flatten(state), flatten(sent)
    return any(flat[name].shape != reference[name].shape for name in flat)


def reply_content(
    state: AdapterState,
    sent: AdapterState,
    parts: frozenset[str],
    round: int,
    metrics: Mapping[str, float | int],
    pack: Pack = plain,
) -> RecordDict:
    """A train reply: the shared parts, the round they belong to, and the metrics (with ``num-examples``, the weight).

    A client whose rank differs from what was sent replies with every factor, since the server could not fill them in.
    All others send what `pack` makes of the shared tensors, given these and what was sent.
    """
    flat, reference = flatten(state), flatten(sent)
    same = not holds_every_factor(state, sent)
    entries = shared(flat, parts) if same else {**flat}
    if same:
        entries = pack(entries, reference)
    entries |= {name: t for name, t in flat.items() if name.endswith("/scaling") and not name.startswith("tensors/")}
    return RecordDict(
        {
            STATE: to_arrays(entries),
            REPLY: ConfigRecord({"schema": SCHEMA, "round": round}),
            METRICS: MetricRecord(dict(metrics)),
        }
    )


def size(content: RecordDict) -> int:
    """Bytes of a message's arrays."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())
