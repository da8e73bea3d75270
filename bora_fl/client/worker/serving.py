"""A worker's life: bind, serve, and end with the job at work finished or cancelled."""

import hmac
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
from filelock import FileLock, Timeout
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from bora_fl.client.worker.address import Address, WorkerSettings, make_token, private_folder
from bora_fl.client.worker.service import SERVICE, TOKEN_HEADER, add_to
from bora_fl.client.worker.servicer import HANDLERS, SiteWorker
from bora_fl.config import ConfigError, Settings

log = logging.getLogger(__name__)

LAST_SECONDS = 10.0
"""What a cancelled job may take to its next step before the process ends regardless."""


def serve(
    settings: WorkerSettings,
    worker: SiteWorker,
    *,
    stop: threading.Event,
    grace: float,
    warm_up: tuple[Settings, tuple[int, int] | None] | None = None,
) -> None:
    """Serve until told to stop.

    Args:
        settings: Where to listen; a TCP address's token is written if its file is missing.
        worker: What does the work.
        stop: Set to end.
        grace: Seconds that the job at work then has to finish.
        warm_up: The run to load model and data for, and the partition whose data to tokenize.

    Raises:
        ConfigError: If the address cannot be used.
    """
    address = settings.address
    if settings.token_file and not address.path:
        make_token(settings.token_file)
    with _sole_owner(address.path) if address.path else nullcontext():
        server, health_service = _server(worker, settings.token())
        _bind(server, address)
        server.start()
        worker.start()
        if warm_up:
            worker.warm_up(*warm_up)
        for name in ("", SERVICE):
            health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("serving on %s (pid %d)", address, os.getpid())
        stop.wait()
        log.info("stopping; the job at work has %g s to finish", grace)
        health_service.enter_graceful_shutdown()
        worker.close()
        server.stop(grace).wait()
        if not worker.wait_idle(LAST_SECONDS):
            log.warning("the job at work does not come to its next step; ending without it")
            logging.shutdown()
            os._exit(1)
        if address.path:
            address.path.unlink(missing_ok=True)
    log.info("stopped")


class _TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token; health is open to probes, which cannot hold one."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        given = next((value for key, value in details.invocation_metadata if key == TOKEN_HEADER), "")
        given = given if isinstance(given, bytes) else given.encode()
        if details.method.startswith("/grpc.health.v1.Health/") or hmac.compare_digest(given, self._expected):
            return continuation(details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


def _refuse(requests: Any, context: Any) -> Iterator[bytes]:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong; see worker-token-file")
    yield b""


def _server(worker: SiteWorker, token: str | None) -> tuple[Any, health.HealthServicer]:
    server = grpc.server(
        ThreadPoolExecutor(max_workers=HANDLERS, thread_name_prefix="call"),
        interceptors=[_TokenInterceptor(token)] if token else [],
        options=[("grpc.so_reuseport", 0)],  # another worker on this port is an error
    )
    add_to(server, worker)
    health_service = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    return server, health_service


def _bind(server: Any, address: Address) -> None:
    before = os.umask(0o177)  # the socket is 0600 from the moment it exists
    try:
        port = server.add_insecure_port(address.target())
    except RuntimeError as error:
        raise ConfigError(f"--listen {address}: it cannot be bound ({error}); is it in use?") from error
    finally:
        os.umask(before)
    if address.path is None and port != address.port:
        raise ConfigError(f"--listen {address}: port {port} was bound instead; give a port above 0")


@contextmanager
def _sole_owner(path: Path) -> Iterator[None]:
    """Hold a socket's lock, which ends with this process however it ends: a second worker must not take the socket."""
    private_folder(path)
    try:
        lock = FileLock(path.with_name(path.name + ".lock"), mode=0o600).acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"--listen unix:{path}: another worker serves there already") from None
    with lock:
        yield
