"""Numbers for Prometheus: ``/metrics`` on the loopback interface, where a port is asked for."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bora_fl.config import ConfigError

Read = Callable[[], Mapping[str, float]]
"""Gives the numbers of this moment."""


def exposition(values: Mapping[str, float]) -> str:
    """The text format of Prometheus: every number a gauge, ``bora_fl_<name>``; ``client/<id>/…`` gets a label."""
    lines: dict[str, list[str]] = {}
    for key, value in sorted(values.items()):
        label = ""
        if found := re.fullmatch(r"client/(\w+)/(.+)", key):
            key, label = f"client_{found[2]}", f'{{client="{found[1]}"}}'
        name = "bora_fl_" + re.sub(r"\W", "_", key)
        lines.setdefault(name, [f"# TYPE {name} gauge"]).append(f"{name}{label} {float(value)!r}")
    return "".join(f"{line}\n" for group in lines.values() for line in group)


@contextmanager
def serving(port: int, read: Read, setting: str) -> Iterator[None]:
    """Serve ``http://127.0.0.1:port/metrics`` meanwhile; nothing if the port is 0.

    Args:
        port: The port.
        read: See `Read`.
        setting: The setting or option that gave the port, for the message.

    Raises:
        ConfigError: If the port cannot be had.
    """
    if not port:
        yield
        return

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            body = exposition(read()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: a scrape every few seconds is no news."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{setting} {port}: it cannot be bound ({error}); give a free port, or 0 for none") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
