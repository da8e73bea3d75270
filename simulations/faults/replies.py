"""Faults inflicted in process: what a broken, outdated or hostile site may send, and a server's full disk."""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from safetensors.torch import save_file

from bora_fl.config import Scalar
from bora_fl.report import read_rows
from bora_fl.simulations.engine import Tamper, simulate
from bora_fl.simulations.faults.command import CONFIG, SITES, Fault, Verdict, judge
from bora_fl.strategies.observer import RunFailedError
from bora_fl.wire.records import from_arrays, to_arrays
from bora_fl.wire.schema import METRICS, REPLY, SCHEMA, STATE

FAULTY, ROUND = 1, 2
Spoil = Callable[[Message], Message]


def only_of(took_part: Mapping[int, frozenset[int]]) -> Tamper:
    """Lets only the given clients' replies through, round by round."""

    def tamper(message: Message, partition: int) -> Message | None:
        return message if partition in took_part[round_of(message)] else None

    return tamper


def round_of(message: Message) -> int:
    """The round that a reply belongs to."""
    return int(message.content.config_records[REPLY]["round"])  # type: ignore[arg-type]


def garbage(message: Message) -> Message:
    """Arrays of random bytes."""
    noise = np.random.default_rng(0).bytes
    arrays = message.content.array_records[STATE]
    broken = {name: Array(a.dtype, tuple(a.shape), a.stype, noise(len(a.data))) for name, a in arrays.items()}
    message.content.array_records[STATE] = ArrayRecord(broken)
    return message


def scaled(factor: float) -> Spoil:
    """All that was trained, times a factor."""

    def spoil(message: Message) -> Message:
        flat = from_arrays(message.content.array_records[STATE])
        flat = {name: t if name.endswith("/scaling") else t * factor for name, t in flat.items()}
        message.content.array_records[STATE] = to_arrays(flat)
        return message

    return spoil


def weighing(examples: float) -> Spoil:
    """A claim of so many examples."""

    def spoil(message: Message) -> Message:
        metrics = {**message.content.metric_records[METRICS], "num-examples": examples}
        message.content.metric_records[METRICS] = MetricRecord(metrics)
        return message

    return spoil


def saying(**reply: int) -> Spoil:
    """Another schema or round."""

    def spoil(message: Message) -> Message:
        record = {**message.content.config_records[REPLY], **reply}
        message.content.config_records[REPLY] = ConfigRecord(record)
        return message

    return spoil


def inflict_reply(spoil: Spoil, more: Mapping[str, Scalar] | None = None) -> Callable[[Path], Verdict]:
    """One site's reply is spoilt in one round; the run must be that in which it did not come."""

    def inflict(folder: Path) -> Verdict:
        def tamper(message: Message, partition: int) -> Message:
            return spoil(message) if (partition, round_of(message)) == (FAULTY, ROUND) else message

        config = CONFIG | dict(more or {}) | {"run.output-dir": str(folder / "output")}
        done = simulate(config, SITES, tamper=tamper)
        row = read_rows(done / "metrics.jsonl")[ROUND - 1]
        reasons: dict[str, Any] = row["reasons"]
        outcome = "set aside: " + "; ".join(map(str, reasons.values())) if reasons else "merged unnoticed"
        verdict = judge(done, config, outcome, None, 0)
        return verdict if reasons else Verdict(outcome, False, verdict.difference, None, 0)

    return inflict


def _full_disk(folder: Path) -> Verdict:
    """The disk is full when round 2 is written; room is made and the run resumed."""
    config = CONFIG | {"run.output-dir": str(folder / "output")}
    written: list[Path] = []

    def save(tensors: Any, path: Path) -> None:
        written.append(path)
        if len(written) == ROUND:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    try:
        with mock.patch("bora_fl.server.checkpoint.save_file", save):
            simulate(config, SITES)
    except RunFailedError as error:
        done = simulate(config | {"run.resume": True}, SITES)
        return judge(done, config, f"stopped: {error}; resumed", None, 1)
    return Verdict("went on without a checkpoint", False, float("nan"), None, 0)


REPLY_FAULTS: dict[str, Fault] = {
    "garbage": Fault("a site sends random bytes", "in process", inflict_reply(garbage)),
    "nan": Fault("a site sends NaN", "in process", inflict_reply(scaled(float("nan")))),
    "negative-weight": Fault("a site claims -100 examples", "in process", inflict_reply(weighing(-100))),
    "huge-weight": Fault("a site claims 1e12 examples", "in process", inflict_reply(weighing(1e12))),
    "old-round": Fault("a site sends the last round's reply", "in process", inflict_reply(saying(round=ROUND - 1))),
    "other-schema": Fault(
        "a site speaks another version of the wire schema", "in process", inflict_reply(saying(schema=SCHEMA + 1))
    ),
    "scaled-100": Fault(
        "a site scales its factors by 100; strategy.max-update-norm = 5",
        "in process",
        inflict_reply(scaled(100.0), {"strategy.max-update-norm": 5.0}),
    ),
    "full-disk": Fault("the server's disk is full while it writes a checkpoint", "in process", _full_disk),
}
