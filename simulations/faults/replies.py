"""Faults injected in process: what a broken, outdated or hostile site may send, and a server's full disk."""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord

from bora_fl.config import Scalar
from bora_fl.report import read_rows, training_rows
from bora_fl.server import checkpoint
from bora_fl.server.checkpoint import Checkpoint
from bora_fl.simulations.engine import round_of, simulate
from bora_fl.simulations.faults.verdict import CONFIG, ROUND, SITES, Fault, Verdict, judge
from bora_fl.strategies.observer import RunFailedError
from bora_fl.wire.records import from_arrays, to_arrays
from bora_fl.wire.schema import METRICS, REPLY, SCHEMA, STATE

FAULTY = 1  # the client whose reply is corrupted
Corrupt = Callable[[Message], Message]


def garbage(message: Message) -> Message:
    """Arrays of random bytes."""
    noise = np.random.default_rng(0).bytes
    arrays = message.content.array_records[STATE]
    broken = {name: Array(a.dtype, tuple(a.shape), a.stype, noise(len(a.data))) for name, a in arrays.items()}
    message.content.array_records[STATE] = ArrayRecord(broken)
    return message


def scaled(factor: float) -> Corrupt:
    """All that was trained, times a factor."""

    def corrupt(message: Message) -> Message:
        flat = from_arrays(message.content.array_records[STATE])
        flat = {name: t if name.endswith("/scaling") else t * factor for name, t in flat.items()}
        message.content.array_records[STATE] = to_arrays(flat)
        return message

    return corrupt


def weighing(examples: float) -> Corrupt:
    """A claim of so many examples."""

    def corrupt(message: Message) -> Message:
        metrics = {**message.content.metric_records[METRICS], "num-examples": examples}
        message.content.metric_records[METRICS] = MetricRecord(metrics)
        return message

    return corrupt


def saying(**reply: int) -> Corrupt:
    """Another schema or round."""

    def corrupt(message: Message) -> Message:
        record = {**message.content.config_records[REPLY], **reply}
        message.content.config_records[REPLY] = ConfigRecord(record)
        return message

    return corrupt


def inject_reply(corrupt: Corrupt, more: Mapping[str, Scalar] | None = None) -> Callable[[Path], Verdict]:
    """One site's reply is corrupted in one round; the run must be that in which it did not come."""

    def inject(folder: Path) -> Verdict:
        def tamper(message: Message, partition: int) -> Message:
            return corrupt(message) if (partition, round_of(message)) == (FAULTY, ROUND) else message

        config = CONFIG | dict(more or {}) | {"run.output-dir": str(folder / "output")}
        done = simulate(config, SITES, tamper=tamper)
        row = next(row for row in read_rows(done / "metrics.jsonl") if row["round"] == ROUND)
        reasons: dict[str, Any] = row["reasons"]
        outcome = "rejected: " + "; ".join(map(str, reasons.values())) if reasons else "merged unnoticed"
        verdict = judge(done, config, outcome, None, 0)
        return verdict if reasons else Verdict(outcome, False, verdict.difference, None, 0)

    return inject


def _full_disk(folder: Path) -> Verdict:
    """The disk is full when round 2 is written; room is made and the run resumed."""
    config = CONFIG | {"run.output-dir": str(folder / "output")}

    def save(folder: Path, state: Checkpoint, *rest: Any) -> Path:
        if state.round == ROUND:
            half = folder / f".round-{ROUND:05d}.part"
            half.mkdir()
            (half / "state.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return checkpoint.save(folder, state, *rest)

    try:
        simulate(config, SITES, save=save)
    except RunFailedError as error:
        done = simulate(config | {"run.resume": True}, SITES)
        return judge(done, config, f"stopped: {error}; resumed", None, 1)
    return Verdict("went on without a checkpoint", False, float("nan"), None, 0)


def _truncated_ledger(folder: Path) -> Verdict:
    """A site's privacy ledger loses its end after round 1: the site refuses, and spends nothing that is not counted."""
    ledgers = folder / "ledger"
    private: dict[str, Scalar] = {
        "privacy.mode": "record",
        "privacy.epsilon": 8.0,
        "privacy.ledger-dir": str(ledgers),
        "strategy.fraction-evaluate": 0.0,
        "strategy.weighting": "uniform",
    }

    def tamper(message: Message, partition: int) -> Message:
        if (partition, len(training_rows(folder / "output" / "metrics.jsonl"))) == (FAULTY, ROUND - 2):
            (own,) = set(ledgers.glob("*.json")) - seen
            own.write_bytes(own.read_bytes()[: own.stat().st_size // 2])
        seen.update(ledgers.glob("*.json"))
        return message

    seen: set[Path] = set()
    config = CONFIG | private | {"run.output-dir": str(folder / "output")}
    rows = training_rows(simulate(config, SITES, tamper=tamper) / "metrics.jsonl")
    refused = [row["reasons"] for row in rows[ROUND - 1 :]]
    alone = all(set(row["per_client"]) == {"0", "2"} for row in rows[ROUND - 1 :])
    reasons = "; ".join(sorted({str(reason) for each in refused for reason in each.values()}))
    # What is noised cannot be compared with another run: right is that the site refuses and the others go on.
    good = alone and all(refused) and "ledger-unreadable" in reasons
    return Verdict(f"refused: {reasons}", good, float("nan"), None, len(refused))


def _fifty_clients(folder: Path) -> Verdict:
    """Five of fifty clients a round, and the server ends after round 2 and is resumed: the draws go on as they were."""
    sampled: dict[str, Scalar] = {"strategy.fraction-train": 0.1, "strategy.min-replies": 1, "data.partition": "iid"}
    config = CONFIG | sampled | {"run.output-dir": str(folder / "output")}

    def save(place: Path, state: Checkpoint, *rest: Any) -> Path:
        if state.round == ROUND and not (folder / "ended").exists():
            (folder / "ended").touch()
            raise OSError(errno.EIO, "the server ends here")
        return checkpoint.save(place, state, *rest)

    try:
        simulate(config, 50, save=save)
    except RunFailedError:
        done = simulate(config | {"run.resume": True}, 50)
        asked = [len(row["per_client"]) for row in training_rows(done / "metrics.jsonl")]
        return judge(done, config, f"resumed; {asked} clients a round", None, 1, sites=50, sampled=5)
    return Verdict("did not end", False, float("nan"), None, 0)


REPLY_FAULTS: dict[str, Fault] = {
    "garbage": Fault("a site sends random bytes", "in process", inject_reply(garbage)),
    "nan": Fault("a site sends NaN", "in process", inject_reply(scaled(float("nan")))),
    "negative-weight": Fault("a site claims -100 examples", "in process", inject_reply(weighing(-100))),
    "huge-weight": Fault("a site claims 1e12 examples", "in process", inject_reply(weighing(1e12))),
    "old-round": Fault("a site sends the last round's reply", "in process", inject_reply(saying(round=ROUND - 1))),
    "other-schema": Fault(
        "a site speaks another version of the wire schema", "in process", inject_reply(saying(schema=SCHEMA + 1))
    ),
    "scaled-100": Fault(
        "a site scales its factors by 100; strategy.max-update-norm = 5",
        "in process",
        inject_reply(scaled(100.0), {"strategy.max-update-norm": 5.0}),
    ),
    "full-disk": Fault("the server's disk is full while it writes a checkpoint", "in process", _full_disk),
    "truncated-ledger": Fault("a site's privacy ledger is cut in half after round 1", "in process", _truncated_ledger),
    "fifty-clients": Fault(
        "5 of 50 clients a round, the server ends in round 2 and is resumed", "in process", _fifty_clients
    ),
}
