"""The worker's side of a call: jobs wait for their turn, one trains at a time, and one that nobody waits for ends."""

import importlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import grpc
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.common.serde import context_from_proto
from flwr.proto.message_pb2 import Context as ProtoContext

from bora_fl import __version__
from bora_fl.client.worker.pieces import Assembly, chunks
from bora_fl.client.worker.worker_pb2 import Chunk, Job, StatusRequest, StatusResponse, WorkRequest, WorkResponse
from bora_fl.config import Settings
from bora_fl.wire.schema import INSTRUCTION, KINDS, REPLY, SCHEMA, Kind

if TYPE_CHECKING:
    from bora_fl.client.processes import Processes

log = logging.getLogger(__name__)

QUEUE = 8
"""Jobs that may wait; a site has one SuperNode, so more are a mistake."""
HANDLERS = QUEUE + 4
"""Threads that answer calls: the queue, the job at work, and some for health and status."""
SECONDS_BETWEEN_LINES = 2.0


class CancelledError(BaseException):
    """Nobody waits for the job any more. Not an `Exception`: no handler of the training's may take it for a failure."""


@dataclass
class _Ticket:
    """A job from its arrival to its end.

    Attributes:
        name: In words, for the log.
        events: Lines of progress; None ends them.
        cancelled: Set when nobody waits any more.
        doing: What it is at.
    """

    name: str
    events: "SimpleQueue[str | None]" = field(default_factory=SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    doing: str = "waiting"
    _said: float = -SECONDS_BETWEEN_LINES
    _stage: str = ""

    def say(self, line: str) -> None:
        """Log a line and send it to the caller."""
        self.doing = line
        log.info("%s: %s", self.name, line)
        self.events.put(line)

    def on_step(self, stage: str, done: int, total: int) -> None:
        """Progress between steps; this is where a cancelled job ends."""
        if self.cancelled.is_set():
            raise CancelledError
        self.doing = f"{stage} {done}/{total}"
        now = time.monotonic()
        if stage != self._stage or done == total or now - self._said >= SECONDS_BETWEEN_LINES:
            self._said, self._stage = now, stage
            self.say(self.doing)


class SiteWorker:
    """Serves `worker.proto`. All jobs run in one thread, which alone touches model, data and ledger.

    That thread imports the large libraries too, so that a restarted worker answers, and queues, within a second or two.

    Args:
        policy_file: The site's policy, which wins over that of a message's node config.
        processes: Processes that train each client together, this one among them.
        shard: Whether they share the base model's weights out.
    """

    def __init__(self, policy_file: Path | None = None, processes: int = 1, shard: bool = False) -> None:
        self._policy_file = policy_file
        self._count, self._shard = processes, shard
        self._processes: Processes | None = None
        self._jobs = ThreadPoolExecutor(max_workers=1, thread_name_prefix="job")
        self._lock = threading.Lock()
        self._tickets: list[_Ticket] = []
        self._counts: Counter[str] = Counter()
        self._started = time.monotonic()
        self._closing = False
        self._base_loads = self._data_loads = 0

    def start(self) -> None:
        """Begin to import the large libraries."""
        self._jobs.submit(self._prepare)

    def warm_up(self, settings: Settings, partition: tuple[int, int] | None) -> None:
        """Load what a run needs before its first round.

        Args:
            settings: The run's.
            partition: The client whose data is tokenized too, and out of how many; None loads the model alone.
        """

        def load() -> None:
            from bora_fl.client import job
            from bora_fl.privacy.policy import find_policy

            started = time.perf_counter()
            try:
                job.warm_up(settings, partition, find_policy({}, self._policy_file), self._processes)
                log.info("warm: %s loaded in %.1f s", settings.model.name, time.perf_counter() - started)
            except Exception:  # round 1 meets the same problem and tells the server
                log.exception("the warm-up failed")
            self._count_loads()

        self._jobs.submit(load)

    def work(self, requests: Iterator[WorkRequest], context: Any) -> Iterator[WorkResponse]:
        """See `worker.proto`."""
        job, node, received = self._receive(requests, context)
        ticket = _Ticket(_name(job, node, received.content))
        finished = self._enter(ticket, lambda: self._run(ticket, job.kind, received.content, node), context)
        finished.add_done_callback(lambda _: self._leave(ticket, finished, job.kind))

        def cancel() -> None:
            ticket.cancelled.set()
            finished.cancel()

        if not context.add_callback(cancel):
            cancel()
        while (line := ticket.events.get()) is not None:
            yield WorkResponse(progress=line)
        if _was_cancelled(finished):
            context.abort(grpc.StatusCode.UNAVAILABLE, "bora-fl worker is stopping; the job was cancelled")
        for part, records in ((Chunk.CONTENT, finished.result()), (Chunk.MEMORY, node.state)):
            for chunk in chunks(records, part):
                yield WorkResponse(chunk=chunk)

    def numbers(self) -> dict[str, float]:
        """What `status` counts, for Prometheus."""
        found = self.status(StatusRequest(), None)
        names = (
            "uptime_seconds",
            "base_loads",
            "data_loads",
            "trained",
            "evaluated",
            "refused",
            "cancelled",
            "waiting",
        )
        return {f"worker/{name}": float(getattr(found, name)) for name in names} | {"worker/busy": bool(found.current)}

    def status(self, request: StatusRequest, context: Any) -> StatusResponse:
        """See `worker.proto`."""
        with self._lock:
            tickets = list(self._tickets)
        current = next((t for t in tickets if t.doing != "waiting"), None)
        return StatusResponse(
            version=__version__,
            pid=os.getpid(),
            uptime_seconds=time.monotonic() - self._started,
            base_loads=self._base_loads,
            data_loads=self._data_loads,
            waiting=sum(t.doing == "waiting" for t in tickets),
            current=f"{current.name}: {current.doing}" if current else "",
            **{name: self._counts[name] for name in ("trained", "evaluated", "refused", "cancelled")},
        )

    def close(self) -> None:
        """Take no more jobs, and drop those that wait."""
        with self._lock:
            self._closing = True
        self._jobs.shutdown(wait=False, cancel_futures=True)

    def wait_idle(self, seconds: float) -> bool:
        """Wait for the job at work; False if it has not ended by then."""
        waiter = threading.Thread(target=self._jobs.shutdown, daemon=True)
        waiter.start()
        waiter.join(seconds)
        return not waiter.is_alive()

    def _receive(self, requests: Iterator[WorkRequest], context: Any) -> tuple[Job, Context, Assembly]:
        """Read a call to its end, before it takes a place in the queue: a slow caller holds up nobody else."""
        first = next(requests, WorkRequest())
        job, received = first.job, Assembly()
        if (job.version, job.schema) != (__version__, SCHEMA):
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the worker is bora-fl {__version__} with wire schema {SCHEMA}, the ClientApp "
                f"{job.version or 'unknown'} with {job.schema}: install the run's version at this site and restart "
                "`bora-fl worker`",
            )
        if job.kind not in KINDS:
            known = ", ".join(KINDS)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"kind {job.kind!r} is none of {known}")
        try:
            node = context_from_proto(ProtoContext.FromString(job.context))
            for request in requests:
                received.add(request.chunk)
        except grpc.RpcError:
            raise
        except Exception as error:  # protobuf and Flower raise what they like at garbage
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the job cannot be read: {error}")
        node.state = received.memory
        return job, node, received

    def _enter(self, ticket: _Ticket, run: Callable[[], RecordDict], context: Any) -> "Future[RecordDict]":
        """Queue a job, or end its call if there is no place for it."""
        with self._lock:
            ahead, closing = len(self._tickets), self._closing
            if not closing and ahead <= QUEUE:
                self._tickets.append(ticket)
                if ahead:
                    log.info("%s: waiting, %d ahead", ticket.name, ahead)
                    ticket.events.put(f"waiting, {ahead} ahead")
                return self._jobs.submit(run)
        if closing:
            context.abort(grpc.StatusCode.UNAVAILABLE, "bora-fl worker is stopping")
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{ahead} jobs are in the queue already")
        raise AssertionError("abort raises")

    def _prepare(self) -> None:
        started = time.perf_counter()
        importlib.import_module("bora_fl.client.job")
        if self._count > 1:
            from bora_fl.client.processes import Processes

            self._processes = Processes(self._count, self._shard)
            try:
                self._processes.start()
            except Exception:  # the first message meets the same problem and tells the server
                log.exception("the other processes could not be started")
        log.info("libraries loaded in %.1f s", time.perf_counter() - started)

    def _run(self, ticket: _Ticket, kind: str, content: RecordDict, node: Context) -> RecordDict:
        """A job's turn, in the one thread that trains."""
        from bora_fl.client import job

        if ticket.cancelled.is_set():
            raise CancelledError
        ticket.say("started")
        try:
            return job.perform(
                cast(Kind, kind), content, node, ticket.on_step, self._policy_file, processes=self._processes
            )
        finally:
            self._count_loads()

    def _count_loads(self) -> None:
        from bora_fl import data
        from bora_fl.client.site import base_loads

        self._base_loads, self._data_loads = base_loads(), data.loads()

    def _leave(self, ticket: _Ticket, finished: "Future[RecordDict]", kind: str) -> None:
        """Count a job that has ended, in whatever way; its call may be gone."""
        reason = ""
        if _was_cancelled(finished):
            outcome = "cancelled"
        elif error := finished.exception():
            outcome, reason = "refused", repr(error)
        else:
            reason = str(finished.result().config_records.get(REPLY, ConfigRecord()).get("refused") or "")
            outcome = "refused" if reason else "trained" if kind == "train" else "evaluated"
        with self._lock:
            self._tickets.remove(ticket)
            self._counts[outcome] += 1
        log.info("%s: %s", ticket.name, f"{outcome}, {reason}" if reason else outcome)
        ticket.events.put(None)


def _was_cancelled(finished: "Future[RecordDict]") -> bool:
    return finished.cancelled() or isinstance(finished.exception(), CancelledError)


def _name(job: Job, node: Context, content: RecordDict) -> str:
    round_number = content.config_records.get(INSTRUCTION, ConfigRecord()).get("round", "?")
    partition = node.node_config.get("partition-id", "?")
    return f"run {node.run_id} round {round_number!r} {job.kind} partition {partition!r}"
