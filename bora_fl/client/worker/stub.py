"""The ClientApp's side: hand a message over to the site's worker and bring its reply back."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from flwr.app import Context, RecordDict
from flwr.common.serde import context_to_proto

from bora_fl import __version__
from bora_fl.client.worker.address import WorkerSettings, check_socket
from bora_fl.client.worker.pieces import Assembly, chunks
from bora_fl.client.worker.service import TOKEN_HEADER, Stub
from bora_fl.client.worker.worker_pb2 import Chunk, Job, StatusRequest, StatusResponse, WorkRequest
from bora_fl.wire.refusals import Code, Refused
from bora_fl.wire.schema import SCHEMA

log = logging.getLogger(__name__)

CHANNEL = [
    ("grpc.enable_http_proxy", 0),  # a proxy of the environment is not for this machine
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class WorkerError(Refused):
    """The site's worker did not do what it was asked."""

    def __init__(self, text: str) -> None:
        super().__init__(Code.WORKER_UNAVAILABLE, text)


def hand_over(settings: WorkerSettings, kind: str, content: RecordDict, context: Context, timeout: float) -> RecordDict:
    """Let the site's worker do a message's work.

    Args:
        settings: How the worker is reached.
        kind: One of `bora_fl.wire.schema.KINDS`.
        content: The message's content.
        context: The node's; its state is replaced by what the worker returns.
        timeout: Seconds after which nobody waits for the reply.

    Returns:
        The reply's content.

    Raises:
        WorkerError: If the worker cannot be reached, stops on the way, or refuses the call.
        ConfigError: If the token cannot be read, or the socket is somebody else's.
    """
    deadline = time.monotonic() + timeout
    with _connected(settings, min(settings.wait, timeout)) as (stub, metadata):
        received = Assembly()
        try:
            call = stub.work(_requests(kind, content, context), timeout=deadline - time.monotonic(), metadata=metadata)
            for response in call:
                if response.WhichOneof("part") == "progress":
                    log.info("worker: %s", response.progress)
                else:
                    received.add(response.chunk)
        except grpc.RpcError as error:
            raise WorkerError(_explain(settings, error, timeout)) from error
    context.state = received.memory
    return received.content


def status(settings: WorkerSettings) -> StatusResponse:
    """What the worker has done and is doing.

    Raises:
        WorkerError: If it cannot be reached or refuses the call.
    """
    with _connected(settings, settings.wait) as (stub, metadata):
        try:
            response: StatusResponse = stub.status(StatusRequest(), timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            raise WorkerError(_explain(settings, error, 5)) from error
        return response


def log_progress() -> None:
    """Let the ClientApp's process, which has no handler of its own for these lines, write them to its log."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("bora-fl | %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


@contextmanager
def _connected(settings: WorkerSettings, wait: float) -> Iterator[tuple[Stub, list[tuple[str, str]]]]:
    with grpc.insecure_channel(settings.address.target(), options=CHANNEL) as channel:
        _wait_for(channel, settings, wait)
        if settings.address.path:
            check_socket(settings.address.path)
        token = settings.token()  # a worker that starts for the first time writes it before it listens
        metadata = [(TOKEN_HEADER, f"Bearer {token}")] if token else []
        yield Stub(channel), metadata


def _wait_for(channel: Any, settings: WorkerSettings, wait: float) -> None:
    ready = grpc.channel_ready_future(channel)
    try:
        ready.result(timeout=max(wait, 1.0))
    except grpc.FutureTimeoutError:
        ready.cancel()
        path = settings.address.path
        try:
            hidden = path is not None and not path.exists()
            why = "there is no such socket" if hidden else "nobody answers"
        except PermissionError:
            why = "this user may not reach it"
        raise WorkerError(
            f"the site worker at {settings.address} cannot be reached ({why}; waited {wait:g} s): start `bora-fl "
            "worker` there as this user, or remove worker from the SuperNode's node config"
        ) from None


def _requests(kind: str, content: RecordDict, context: Context) -> Iterator[WorkRequest]:
    bare = Context(context.run_id, context.node_id, context.node_config, RecordDict(), context.run_config)
    header = context_to_proto(bare).SerializeToString()
    yield WorkRequest(job=Job(version=__version__, schema=SCHEMA, kind=kind, context=header))
    for chunk in chunks(content, Chunk.CONTENT):
        yield WorkRequest(chunk=chunk)
    for chunk in chunks(context.state, Chunk.MEMORY):
        yield WorkRequest(chunk=chunk)


def _explain(settings: WorkerSettings, error: Any, timeout: float) -> str:
    who, code = f"the site worker at {settings.address}", error.code()
    if code == grpc.StatusCode.UNAVAILABLE and "bora-fl" not in (error.details() or ""):
        return (
            f"{who} ended while it worked on this message; nothing of it is kept, except that steps booked in the "
            f"privacy ledger stay spent ({error.details()})"
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{who} was not done within {timeout:g} s (strategy.timeout); the work is cancelled"
    return f"{who} refused: {error.details()} ({code.name})"
