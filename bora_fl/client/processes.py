"""Further processes that train one client together with this one; this one talks, and alone writes what stays.

They are started once and wait for jobs on their standard input: what to do, the granted settings and who the client is,
then the message and the client's memory as the chunks that a ClientApp sends to a worker. Each decodes and checks them
as this process has. They end with it.

Where each has the whole base model, they are given the training alone. Where its weights are shared out, every job is
theirs, since none can take a pass through the model without the others.
"""

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal

import torch
from flwr.app import RecordDict
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from bora_fl.client import sharding
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.share import Share, connect
from bora_fl.client.site import forget
from bora_fl.client.worker.pieces import Assembly, chunks
from bora_fl.client.worker.worker_pb2 import Chunk
from bora_fl.config import Settings
from bora_fl.wire.refusals import Code, Refused
from bora_fl.wire.schema import Kind

Job = Kind | Literal["share", "warm-up"]

log = logging.getLogger(__name__)

ALIKE = frozenset((Code.MESSAGE_INVALID, Code.FOLDS_MISSING, Code.STATE_MISSING))
"""What every process refuses that is given the whole job, before it takes a pass through the model."""

_LENGTH = struct.Struct("<Q")
_LOOK = 0.05  # seconds between two looks for whether a process is there
_TO_END = 2.0  # seconds after which a process whose connection broke counts as alive


class Processes:
    """Starts them, gives them jobs, and starts them anew after one was lost.

    Args:
        count: Processes in all, this one among them.
        shard: Share the base model's weights out.

    Attributes:
        mesh: Connects the processes that share the weights out; None where each has all.
    """

    def __init__(self, count: int, shard: bool = False) -> None:
        self.count, self.shards = count, shard
        self.mesh: DeviceMesh | None = None
        self._others: list[subprocess.Popen[bytes]] = []
        self._group: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._devices: list[str] | None = None

    def start(self) -> None:
        """Start the others, if not all of them are there, and wait until they are connected.

        Raises:
            Refused: If one ends before.
        """
        if self._group is not None and not self._lost():
            return
        self.close()
        if self._devices is None:
            self._devices = _take_first_device()
        # This user's alone; it stays, since the others may still read when this process is connected.
        self._folder = tempfile.TemporaryDirectory(prefix="bora-fl-")
        path = Path(self._folder.name) / "store"
        store = FileStore(str(path), self.count)
        command = [sys.executable, "-m", "bora_fl.client.further_process", str(path)]
        devices = len(self._devices)
        for rank in range(1, self.count):
            mine = {"CUDA_VISIBLE_DEVICES": self._devices[rank % len(self._devices)]} if self._devices else {}
            arguments = [*command, str(rank), str(self.count), *([str(devices)] if self.shards else [])]
            environment = os.environ | mine
            self._others.append(subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE))
        try:
            while not store.check([f"process-{rank}" for rank in range(1, self.count)]):
                if lost := self._lost():
                    raise Refused(Code.WORKER_UNAVAILABLE, f"{lost} before it was connected; this log has its reason")
                time.sleep(_LOOK)
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
            self._group = connect(store, 0, self.count)
            if self.shards:
                self.mesh = sharding.connect(path.with_name("shards"), 0, self.count, devices)
        except BaseException:
            self.close()
            raise
        log.info(
            "%d processes train each client together%s",
            self.count,
            ", with a part of the base model each" * self.shards,
        )

    @contextmanager
    def at_work(
        self,
        settings: Settings,
        content: RecordDict,
        who: ClientIdentity,
        memory: RecordDict,
        job: Job = "share",
        evaluates: bool = False,
    ) -> Iterator[Share]:
        """Let the others do the same job, each its share of the training; yields this process's.

        Args:
            settings: As the site grants them.
            content: The message's.
            who: The client.
            memory: What the client keeps, as it was when the message came.
            job: ``share``, the training of a message that this process does, or all that is done with the message.
            evaluates: Whether this process evaluates before it trains.

        Raises:
            Refused: If a process is lost. The others are ended, and the next job starts all anew.
        """
        self.start()
        share = Share(0, self.count, self._group, self.shards)
        told = {"job": job, "settings": settings.flat(), "who": asdict(who), "evaluates": evaluates}
        try:
            for other in self._others:
                assert other.stdin is not None
                _send(other.stdin, told, content, memory)
            yield share
        except BaseException as error:
            alike = isinstance(error, Refused) and error.code in ALIKE and self.shards
            alike = alike or isinstance(error, FloatingPointError)
            if share.agreed or alike:  # the others have ended this job too
                raise
            lost = self._lost(_TO_END) if isinstance(error, (RuntimeError, OSError)) else ""
            self.close()
            if lost:
                text = f"{lost} while it trained; this log has its reason, and the next message starts it anew"
                raise Refused(Code.WORKER_UNAVAILABLE, text) from error
            raise

    def close(self) -> None:
        """End the others."""
        for other in self._others:
            other.kill()
            other.wait()
            with suppress(OSError):  # what a lost process did not read
                assert other.stdin is not None
                other.stdin.close()
        self._others, self._group = [], None
        if self.mesh is not None:
            sharding.disconnect()
            self.mesh = None
            forget()  # the others' parts of the weights are gone
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def _lost(self, seconds: float = 0.0) -> str:
        """The first process that has ended, in words, within that many seconds; empty if there is none."""
        deadline = time.monotonic() + seconds
        while True:
            for rank, other in enumerate(self._others, 1):
                if (code := other.poll()) is not None:
                    return f"process {rank} of this worker's {self.count} ended with code {code}"
            if time.monotonic() >= deadline:
                return ""
            time.sleep(_LOOK)


def loopback() -> str:
    """The name of this machine's loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _take_first_device() -> list[str]:
    """The CUDA devices there are; this process keeps the first, before it has used any."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count()
    devices = [name for name in named.split(",") if name][:count] or [str(i) for i in range(count)]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[0]
    return devices


def _send(stream: IO[bytes], told: dict[str, Any], content: RecordDict, memory: RecordDict) -> None:
    def frame(data: bytes) -> None:
        stream.write(_LENGTH.pack(len(data)) + data)

    frame(json.dumps(told).encode())
    for part, records in ((Chunk.CONTENT, content), (Chunk.MEMORY, memory)):
        for chunk in chunks(records, part):
            frame(chunk.SerializeToString())
    frame(b"")
    stream.flush()


def read_job(stream: IO[bytes]) -> tuple[dict[str, Any], Assembly] | None:
    """The next job, the counterpart of what `Processes.at_work` sends; None at the end of the stream."""

    def frame() -> bytes:
        head = stream.read(_LENGTH.size)
        return stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""

    if not (first := frame()):
        return None
    received = Assembly()
    while data := frame():
        received.add(Chunk.FromString(data))
    return json.loads(first), received
