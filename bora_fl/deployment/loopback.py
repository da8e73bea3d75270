"""A whole deployment on this machine's loopback: every process that three organisations would run, with TLS and keys.

One SuperLink with node authentication, a database and `--isolation process`, the SuperExec that starts ServerApps, and
for each site a SuperNode and the SuperExec that starts ClientApps, each behind a secret of its own. Killing a service
takes its descendants along, as a machine that fails does.
"""

import contextlib
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.client.worker.stub import status
from bora_fl.client.worker.worker_pb2 import StatusResponse
from bora_fl.config import Scalar
from bora_fl.deployment.certificates import make_server, make_site
from bora_fl.deployment.launch import flower_environment
from bora_fl.deployment.processes import Service, exit_on_sigterm, tool
from bora_fl.report import training_rows

CONNECTION = "loopback"
OPERATOR = "operator"
STARTUP_SECONDS = 60.0


class DeploymentError(RuntimeError):
    """A deployment that did not come up, with the end of the log that says why."""


def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """One organisation: its keys, its SuperNode and the SuperExec that starts its ClientApps.

    Args:
        partition: Which partition it serves.
        deployment: What it belongs to.
        key: The private key to authenticate with; its own by default.
    """

    def __init__(self, partition: int, deployment: "Deployment", key: Path | None = None) -> None:
        self.partition, self.name = partition, f"site{partition}"
        self.folder = deployment.folder / self.name
        own, self.public_key, secret = make_site(self.folder / "keys", self.name)
        state = {"FLWR_HOME": str(self.folder / "flwr"), "BORA_FL_STATE": str(self.folder / "state")}
        environment = deployment.environment | state
        socket = f"unix:{self.folder / 'worker' / 'worker.sock'}"
        config = f"partition-id={partition} num-partitions={deployment.num_sites}"
        address = ("127.0.0.1", free_port())
        self.node = Service(
            "supernode",
            [
                tool("flower-supernode"),
                *("--superlink", deployment.address, "--root-certificates", str(deployment.authority)),
                *("--auth-supernode-private-key", str(key or own)),
                *("--host", address[0], "--port", str(address[1])),
                *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
                *("--node-config", f'{config} worker="{socket}"' if deployment.workers else config),
            ],
            self.folder,
            environment,
        )
        self.executor = Service(
            "clientapp",
            [
                tool("flower-superexec"),
                *("--insecure", "--runtime-api-address", f"{address[0]}:{address[1]}"),
                *("--superexec-auth-secret-file", str(secret)),
            ],
            self.folder,
            environment,
        )

        self.worker: Service | None = None
        if deployment.workers:
            self._worker_settings = WorkerSettings(Address.read(socket), wait=20.0)
            command = [tool("bora-fl"), "worker", "--listen", socket]
            self.worker = Service("worker-process", command, self.folder, environment)

    @property
    def services(self) -> list[Service]:
        """All its processes, in the order in which they start."""
        return [*([self.worker] if self.worker else []), self.node, self.executor]

    def work(self) -> StatusResponse:
        """What the site's worker has done and is doing.

        Raises:
            WorkerError: If there is none, or it does not answer.
        """
        return status(self._worker_settings)

    def start(self) -> None:
        """Start every process of the site."""
        for service in self.services:
            service.start()

    def kill(self) -> None:
        """The site's machine loses its power."""
        for service in self.services:
            service.kill()


class Deployment:
    """A SuperLink and its sites; a context manager that ends every process it has started.

    Args:
        folder: Keys, certificates, logs, databases and results.
        num_sites: Number of sites; site i serves partition i.
        environment: More environment variables for every process.
        absent: Sites that are registered and not started.
        workers: Every site runs `bora-fl worker`.
    """

    def __init__(
        self,
        folder: Path,
        num_sites: int = 3,
        environment: Mapping[str, str] | None = None,
        absent: Sequence[int] = (),
        workers: bool = True,
    ) -> None:
        self.folder, self.num_sites, self._absent, self.workers = folder.resolve(), num_sites, absent, workers
        # Sites and server share this machine's cores: one thread each, and quick looks for new tasks.
        shared = {"OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        self.environment = flower_environment() | shared | dict(environment or {})
        self.port = free_port()
        server = self.folder / "server"
        self.authority, _, certificate, key, secret = make_server(server / "keys", ["localhost", "127.0.0.1"])
        own = self.environment | {"FLWR_HOME": str(server / "flwr")}
        self.superlink = Service(
            "superlink",
            [
                tool("flower-superlink"),
                *("--ssl-ca-certfile", str(self.authority)),
                *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
                "--enable-supernode-auth",
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
                *("--database", str(server / "state.db"), "--disable-runtime-dependency-installation"),
            ],
            server,
            own,
        )
        self.executor = Service("serverapp", self.superexec(secret), server, own)
        self.sites = [Site(partition, self) for partition in range(num_sites)]

    @property
    def address(self) -> str:
        """Where the SuperLink listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def services(self) -> list[Service]:
        """Every process of server and sites."""
        return [self.superlink, self.executor, *(service for site in self.sites for service in site.services)]

    def superexec(self, secret: Path | None) -> list[str]:
        """The command of a SuperExec that asks the SuperLink for ServerApp tasks."""
        proof = ("--superexec-auth-secret-file", str(secret)) if secret else ()
        return [
            *(tool("flower-superexec"), "--root-certificates", str(self.authority)),
            *("--runtime-api-address", self.address, *proof),
        ]

    def __enter__(self) -> Self:
        self._exit = contextlib.ExitStack()
        self._exit.enter_context(exit_on_sigterm())
        try:
            self.superlink.start()
            self.write_connection()
            self.wait_until_up()
            self.executor.start()
            for site in self.sites:
                self.flwr("supernode", "register", str(site.public_key), CONNECTION)
                if site.partition not in self._absent:
                    site.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process; what they wrote stays."""
        self._exit.close()
        for service in reversed(self.services):
            service.stop()

    def tend(self) -> None:
        """Start again what has ended by itself."""
        for service in self.services:
            service.tend()

    def wait_until_up(self) -> None:
        """Wait until the SuperLink answers over TLS.

        Raises:
            DeploymentError: If it does not.
        """
        context = ssl.create_default_context(cafile=str(self.authority))
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline and self.superlink.pid:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"https://{self.address}/health", timeout=1, context=context).close()
                return
            time.sleep(0.2)
        raise DeploymentError(f"the SuperLink did not start on {self.address}:\n{self.superlink.tail()}")

    def flwr(self, *arguments: str, home: str = OPERATOR) -> str:
        """Run Flower's command and return what it prints.

        Args:
            arguments: Without ``flwr`` itself.
            home: The folder whose connection is used.

        Raises:
            DeploymentError: If it fails.
        """
        environment = self.environment | {"FLWR_HOME": str(self.folder / home)}
        result = subprocess.run(
            [tool("flwr"), *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise DeploymentError(f"flwr {' '.join(arguments)} failed:\n{result.stdout}{result.stderr}")
        return result.stdout

    def submit(self, run_config: Mapping[str, Scalar], *, app: Path | None = None) -> Service:
        """Start ``bora-fl run`` on the deployment.

        Args:
            run_config: Overrides of the run config; ``run.output-dir`` is set to a folder of the deployment if missing.
            app: The Flower app; the installed package by default.
        """
        settings = {"run.output-dir": str(self.output), **run_config}
        text = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()}
        overrides = [part for key, value in text.items() for part in ("-c", f"{key}={value}")]
        command = [tool("bora-fl"), "run", CONNECTION, *(["--app", str(app)] if app else []), *overrides]
        run = self.operator("run", command)
        run.start()
        return run

    def operator(self, name: str, command: list[str]) -> Service:
        """A command as the one who submits runs gives it."""
        home = self.folder / OPERATOR
        state = {"FLWR_HOME": str(home), "BORA_FL_STATE": str(home / "state")}
        return Service(name, command, self.folder, self.environment | state)

    @property
    def output(self) -> Path:
        """Where a run that names no folder leaves its results."""
        return self.folder / "output"

    def rounds(self) -> list[dict[str, object]]:
        """The finished rounds of the run in `output`."""
        return training_rows(self.output / "metrics.jsonl")

    def write_connection(self, name: str = OPERATOR, authority: Path | None = None) -> None:
        """Write a Flower home that knows the SuperLink, and whom to trust: its own authority by default."""
        home = self.folder / name
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{self.address}"\n'
            f'root-certificates = "{authority or self.authority}"\n'
        )


def finished(run: Service, seconds: float, among: Sequence[Service] = ()) -> str:
    """Wait for a run to end well and return what it printed.

    Args:
        run: From `Deployment.submit`.
        seconds: How long it may take.
        among: Services whose logs tell more where it does not.

    Raises:
        DeploymentError: If it fails or takes longer.
    """
    code = run.wait(seconds)
    if code != 0:
        run.stop()
        logs = "\n".join(f"--- {service.folder.name}/{service.name}\n{service.tail()}" for service in (run, *among))
        raise DeploymentError(f"the run ended with {code} (None: not within {seconds:.0f} s)\n{logs}")
    return run.log.read_text()
