"""Adapter states, instructions and replies as Flower records, versioned."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import safetensors.numpy
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from torch import Tensor

from bora_fl.paths import path_part
from bora_fl.state import AdapterState, flatten, unflatten
from bora_fl.wire.refusals import Code, Refused
from bora_fl.wire.schema import INSTRUCTION, METRICS, REPLY, SCHEMA, STATE
from bora_fl.wire.sparsity import By

PACKED = "safetensors"


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
        )


def to_arrays(flat: Mapping[str, Tensor]) -> ArrayRecord:
    """Named tensors as a Flower record: one array, whose bytes are a safetensors file.

    Flower stores, signs and requests every array as two objects of its own, on each of the four ways of a round; for
    the 50 tensors of a small adapter that costs more than its training. Half precision travels as float32.
    """
    wide = {
        name: tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).contiguous().numpy()
        for name, tensor in flat.items()
    }
    data = safetensors.numpy.save(wide)
    return ArrayRecord({PACKED: Array(dtype="uint8", shape=(len(data),), stype=PACKED, data=data)})


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


def shared(flat: Mapping[str, Tensor], parts: frozenset[str]) -> dict[str, Tensor]:
    """The entries of a flattened state that belong to the given parts (of A, sigma, B, tensors)."""
    return {name: t for name, t in flat.items() if part_of(name) in parts}


def part_of(name: str) -> str:
    """Which part an entry of a flattened state is: A, sigma, B, scaling or tensors."""
    return "tensors" if name.startswith("tensors/") else name.rpartition("/")[2]


def state_of(content: RecordDict) -> AdapterState:
    """The adapter state that a message carries.

    Raises:
        ValueError: If it carries none, or one with parts missing.
    """
    if STATE not in content.array_records:
        raise ValueError("the message carries no adapter state")
    return unflatten(from_arrays(content.array_records[STATE]))


def reply_content(
    state: AdapterState, sent: AdapterState, parts: frozenset[str], round: int, metrics: Mapping[str, float | int]
) -> RecordDict:
    """A train reply: the shared parts, the round they belong to, and the metrics (with ``num-examples``, the weight).

    A client whose rank differs from what was sent replies with every factor, since the server could not fill them in.
    """
    flat, reference = flatten(state), flatten(sent)
    same = all(flat[name].shape == reference[name].shape for name in flat)
    entries = shared(flat, parts) if same else {**flat}
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
