"""Where a site worker is reached, and who may reach it.

A Unix socket is guarded by the file system: mode 0600 in a folder of mode 0700, both of the worker's user. Loopback
TCP, which every local user reaches, takes a token.
"""

import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from bora_fl.config import ConfigError, Scalar

LONGEST_PATH = 107  # bytes; what a sockaddr_un holds


@dataclass(frozen=True)
class Address:
    """Where a worker listens: `path` of a Unix socket, or else `host` and `port` on loopback."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def read(cls, text: str) -> "Address":
        """From ``unix:/run/bora-fl/worker.sock`` or ``tcp:127.0.0.1:7117``.

        Raises:
            ConfigError: For anything else, a path too long for a socket, or a host that is not loopback.
        """
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            path = Path(os.path.abspath(Path(rest).expanduser()))
            if len(os.fsencode(path)) > LONGEST_PATH:
                raise ConfigError(f"worker = {text!r}: a socket's path has at most {LONGEST_PATH} bytes; shorten it")
            return cls(path=path)
        host, _, port = rest.rpartition(":")
        host = host.strip("[]")
        if kind == "tcp" and host and port.isdigit() and int(port) < 1 << 16:
            try:
                loopback = host == "localhost" or ip_address(host).is_loopback
            except ValueError:
                loopback = False
            if not loopback:
                raise ConfigError(
                    f"worker = {text!r}: the worker speaks without TLS, on this machine only; use 127.0.0.1"
                )
            return cls(host="127.0.0.1" if host == "localhost" else host, port=int(port))
        raise ConfigError(f"worker = {text!r}: write unix:/path/to/worker.sock or tcp:127.0.0.1:7117")

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp:{self.host}:{self.port}"

    def target(self) -> str:
        """In gRPC's form."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class WorkerSettings:
    """How a site's ClientApp reaches its worker.

    Attributes:
        address: Where it listens.
        token_file: Holds the token of a TCP address.
        wait: Seconds to wait for a worker that does not answer, since it may be restarting.
    """

    address: Address
    token_file: Path | None = None
    wait: float = 60.0

    def __post_init__(self) -> None:
        if self.address.path is None and self.token_file is None:
            raise ConfigError(
                f"worker = '{self.address}': every local user reaches a port; name the file of its token "
                "(worker-token-file in the node config, --token-file of `bora-fl worker`)"
            )

    @classmethod
    def read(cls, node_config: Mapping[str, Scalar]) -> "WorkerSettings | None":
        """From a SuperNode's node config: ``worker``, ``worker-token-file``, ``worker-wait``; None without ``worker``.

        Raises:
            ConfigError: If they cannot be used.
        """
        if not node_config.get("worker"):
            return None
        wait = node_config.get("worker-wait", cls.wait)
        if isinstance(wait, bool | str) or not 0 <= wait < float("inf"):
            raise ConfigError(f"worker-wait = {wait!r}: give seconds, 0 or more")
        token_file = str(node_config.get("worker-token-file", ""))
        address = Address.read(str(node_config["worker"]))
        return cls(address, Path(token_file).expanduser() if token_file else None, float(wait))

    def token(self) -> str | None:
        """What a TCP address asks for; None for a Unix socket.

        Raises:
            ConfigError: See `read_token`.
        """
        return None if self.address.path or self.token_file is None else read_token(self.token_file)


def read_token(file: Path) -> str:
    """The token in a file that only its owner can read.

    Raises:
        ConfigError: If the file is missing, empty, or open to others.
    """
    try:
        mode, token = file.stat().st_mode, file.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"worker-token-file = {str(file)!r}: {error.strerror}; `bora-fl worker` writes one"
        ) from error
    if mode & 0o077:
        raise ConfigError(f"worker-token-file = {str(file)!r}: others may read it; run chmod 600 {file}")
    if len(token) < 16:
        raise ConfigError(f"worker-token-file = {str(file)!r}: a token has 16 characters or more; delete the file")
    return token


def make_token(file: Path) -> None:
    """Write a new token, readable by its owner alone, unless the file exists."""
    if not file.exists():
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new:
            new.write(secrets.token_urlsafe(32))


def check_socket(path: Path) -> None:
    """Refuse a socket that another user could have put there, before anything is sent to it.

    Raises:
        ConfigError: If the socket belongs to somebody else.
    """
    if (owner := path.stat().st_uid) != os.geteuid():
        raise ConfigError(f"worker = 'unix:{path}': it belongs to user {owner}, not to this one ({os.geteuid()})")


def private_folder(path: Path) -> None:
    """Make a socket's folder, or check that nobody else can reach into it.

    Raises:
        ConfigError: If it belongs to somebody else or is open to others.
    """
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"worker = 'unix:{path}': {folder} must belong to the worker's user alone; use a folder of its own, "
            f"with chmod 700 {folder}"
        )
