"""docs/deployment.md, followed literally: its blocks on machines that are folders, its services as the units say.

A block whose first line is a key of `PLACES` is executed there, in bash, with other host names, ports and folders. What
changes a machine (``useradd``, ``apt-get``, ``pip``, ``systemctl``) is a stand-in, and ``scp`` copies between folders.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bora_fl.deployment.loopback import free_port
from bora_fl.deployment.processes import Service
from bora_fl.paths import cache_folder

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "deployment.md"
CHECKOUT = ("bora_fl", "kernels", "simulations", "deploy", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
PLACES = {
    "# on the server": ("server",),
    "# at each site": ("site",),
    "# on every machine": ("server", "site", "operator"),
    "# at the operator": ("operator",),
}
STARTUP_SECONDS = 120


def blocks(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a block is executed, and its commands."""
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        first, _, rest = block.partition("\n")
        if first in PLACES:
            yield PLACES[first], rest


@dataclass(frozen=True)
class Unit:
    """A systemd unit, as far as ours need it."""

    name: str
    entries: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, path: Path) -> "Unit":
        """Its ``key=value`` lines, continued lines joined."""
        text = path.read_text().replace("\\\n", " ")
        return cls(path.stem, tuple(re.findall(r"^([A-Za-z]+)=(.*)$", text, re.MULTILINE)))

    def every(self, key: str) -> list[str]:
        """All values of a key."""
        return [value for name, value in self.entries if name == key]

    def one(self, key: str) -> str:
        """Its only value."""
        (value,) = self.every(key)
        return value


def environment_file(path: Path) -> dict[str, str]:
    """The variables of an ``EnvironmentFile``."""
    lines = [line.partition("=") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {name: value.strip("'") for name, _, value in lines}


def command(unit: Unit, credentials: str, environment: Mapping[str, str]) -> list[str]:
    """The words that systemd would execute: a variable in braces is one word."""
    words = unit.one("ExecStart").replace("%d", credentials).split()
    return [re.sub(r"\$\{(\w+)\}", lambda found: environment[found[1]], word) for word in words]


class Machine:
    """A folder that stands for a machine.

    Args:
        folder: It.
        name: Takes the place of ``berlin``.
        server: The server's folder.
        ports: What the page's ports are here.
        partition: Takes the place of ``partition-id=0``.
    """

    def __init__(self, folder: Path, name: str, server: Path, ports: Mapping[str, int], partition: int = 0) -> None:
        self.folder, self.name, self.services = folder, name, list[Service]()
        self._changes = {
            "server.example.org:/etc/bora-fl": f"{server}/etc",
            "server.example.org": "localhost",
            "listen 84": "listen 127.0.0.1:84",
            "/etc/bora-fl": f"{folder}/etc",
            "/var/lib/bora-fl": f"{folder}/lib",
            "/run/bora-fl": f"{folder}/run/bora-fl",
            "/opt/bora-fl": f"{folder}/opt",
            "/etc/systemd/system": f"{folder}/units",
            "berlin": name,
            "=partition-id=0": f"=partition-id={partition}",
            "/partition-id=0": f"/partition-id={partition}",
            **{f":{port}": f":{number}" for port, number in ports.items()},
            **{f"--port {port}": f"--port {number}" for port, number in ports.items()},
        }
        for part in ("etc", "lib", "run", "opt/bin", "units", "home", "credentials", "checkout"):
            (folder / part).mkdir(parents=True)
        (folder / "lib" / "cache").symlink_to(cache_folder())
        self._copy_checkout()
        self._make_stand_ins()

    def here(self, text: str) -> str:
        """A text of the page or the kit with this machine's names."""
        for old, new in self._changes.items():
            text = text.replace(old, new)
        return text

    def execute(self, block: str) -> None:
        """Execute a block, then start the services that it has enabled."""
        environment = {
            "PATH": f"{self.folder / 'opt' / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder / "home"),
            "BORA_FL_CACHE": str(cache_folder()),
            "FLWR_TELEMETRY_ENABLED": "0",
            **inherited(),
        }
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{self.here(block)}"],
            cwd=self.folder / "checkout",
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, f"{self.name}: {block}\n{done.stdout}\n{done.stderr}"
        wanted = self.folder / "enabled"
        for name in wanted.read_text().split() if wanted.is_file() else ():
            self._start(name)
        wanted.unlink(missing_ok=True)

    def _start(self, name: str) -> None:
        unit = Unit.read(self.folder / "units" / f"{name}.service")
        credentials = self.folder / "credentials" / name
        credentials.mkdir()
        for entry in unit.every("LoadCredential"):
            identity, _, path = entry.partition(":")
            shutil.copy(path, credentials / identity)
        for runtime in unit.every("RuntimeDirectory"):
            (self.folder / "run" / runtime).mkdir(mode=int(unit.one("RuntimeDirectoryMode"), 8))
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder / "home"), **inherited()}
        for entry in unit.every("Environment"):
            key, _, value = entry.replace("%d", str(credentials)).partition("=")
            environment[key] = value
        for path in unit.every("EnvironmentFile"):
            environment |= environment_file(Path(path))
        words = command(unit, str(credentials), environment)
        mask = unit.every("UMask") or ["0022"]
        shell = ["sh", "-c", f'umask {mask[0]}; exec "$@"', "sh", *words]
        service = Service(name, shell, self.folder / "logs", environment, self.folder / "lib")
        self.services.append(service)
        service.start()
        if "--port" in words:
            await_port(int(words[words.index("--port") + 1]), service)
        if "-c" in words and (found := re.search(r"listen 127.0.0.1:(\d+)", Path(words[-1]).read_text())):
            await_port(int(found[1]), service)

    def _copy_checkout(self) -> None:
        checkout = self.folder / "checkout"
        for name in CHECKOUT:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, checkout / name)
        for path in (checkout / "deploy").rglob("*"):
            if path.is_file():
                path.write_text(self.here(path.read_text()))

    def _make_stand_ins(self) -> None:
        tools = self.folder / "opt" / "bin"
        for path in Path(sys.executable).parent.glob("*"):
            if path.name in {"bora-fl", "flwr"} or path.name.startswith(("flower-", "flwr-")):
                (tools / path.name).symlink_to(path)
        enable = f'[ "$1" = enable ] || exit 0; shift; [ "$1" = --now ] && shift; echo "$@" >> {self.folder}/enabled'
        nothing = dict.fromkeys(("useradd", "apt-get", "pip", "python3"), "exit 0")
        for name, script in {**nothing, "scp": 'exec cp "$@"', "systemctl": enable}.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)


class Federation:
    """Every machine of the page: a server, two sites, an operator."""

    def __init__(self, folder: Path) -> None:
        # 8443 and 8444 are the server's ports for all, 9091 is its own; the others are each machine's own.
        self.ports = {port: free_port() for port in ("8443", "8444", "9091")}
        self.server, *self.sites, self.operator = (
            Machine(
                folder / name,
                name,
                folder / "server",
                self.ports | {port: free_port() for port in ("9443", "9094")},
                partition,
            )
            for name, partition in (("server", 0), ("berlin", 0), ("paris", 1), ("ada", 0))
        )
        self.machines = [self.server, *self.sites, self.operator]

    def follow(self) -> int:
        """Execute every block of the page in its order and return how many there were."""
        places = {"server": [self.server], "site": self.sites, "operator": [self.operator]}
        found = list(blocks(PAGE.read_text()))
        for where, block in found:
            for machine in [machine for place in where for machine in places[place]]:
                machine.execute(block)
        return len(found)

    def logs(self) -> str:
        """The end of every service's log."""
        services = [(machine.name, service) for machine in self.machines for service in machine.services]
        return "\n".join(f"--- {name}/{service.name}\n{service.tail()}" for name, service in services)

    def close(self) -> None:
        """End every service."""
        for machine in self.machines:
            for service in reversed(machine.services):
                service.stop()


def inherited() -> dict[str, str]:
    """What every process needs to be this checkout's, and to share this machine's cores."""
    return {"OMP_NUM_THREADS": "1"} | {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}


def await_port(port: int, service: Service) -> None:
    """Wait until a service listens."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and service.pid:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"{service.name} does not listen on {port}:\n{service.tail(40)}")
