"""A child process with its descendants: one lifecycle for whatever the commands start.

Some of Flower's and Ray's processes make sessions of their own, and an orphan has lost its parent, so neither a process
group nor a walk from parent to child finds all descendants. A mark in the environment, which every descendant inherits,
does.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

MARK = "BORA_FL_SERVICES"
"""Environment variable: the marks of the services that a process descends from, colon-separated."""
RESTART_SECONDS = 5.0
GRACE_SECONDS = 5.0


@dataclass
class Service:
    """One child process with its descendants, in a session of its own.

    Attributes:
        name: Names the log, ``<name>.log`` in the folder.
        command: What is executed.
        folder: Where the log is, and the working directory unless `directory` names another.
        environment: The whole environment.
        directory: Working directory.
        tied: The child calls `end_with_parent`, so that it ends with this process, however this process ends.
    """

    name: str
    command: list[str]
    folder: Path
    environment: Mapping[str, str]
    directory: Path | None = None
    tied: bool = False
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _mark: str = field(default_factory=lambda: secrets.token_hex(8), repr=False)
    _wanted: bool = False
    _started: float = 0.0
    _offset: int = 0

    @property
    def log(self) -> Path:
        """Standard output and error of every start."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """The process, if it is running."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start it, or start it again."""
        self._wanted, self._started = True, time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        marks = ":".join(filter(None, [self.environment.get(MARK, os.environ.get(MARK, "")), self._mark]))
        with self.log.open("ab") as log:
            self._offset = log.tell()
            self._process = subprocess.Popen(
                self.command,
                cwd=self.directory or self.folder,
                env={**self.environment, MARK: marks},
                stdin=subprocess.PIPE if self.tied else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it and its descendants as a power cut would."""
        self._wanted = False
        if self._process is not None:
            kill_family(self._mark, self._process.pid)
            self.wait(GRACE_SECONDS)
            if self._process.stdin:
                self._process.stdin.close()

    def stop(self) -> None:
        """Ask it and its descendants to end; insist after five seconds."""
        self._wanted = False
        self.signal(signal.SIGTERM)
        self.wait(GRACE_SECONDS)
        self.kill()

    def tend(self) -> None:
        """Start it again if it has ended by itself, as systemd would."""
        if self._wanted and self.pid is None and time.monotonic() - self._started > RESTART_SECONDS:
            self.start()

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None if it is still running after that long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds) if self._process else None
        return None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and its descendants."""
        if self._process is not None:
            for process in family(self._mark, self._process.pid):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)

    def text(self) -> str:
        """What it has written since it was last started."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as log:
            log.seek(self._offset)
            return log.read().decode(errors="replace")

    def tail(self, lines: int = 15) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.is_file() else ""

    def follow(self, seconds: float = 0.2) -> Iterator[str]:
        """The lines that it writes, as they come, until it has ended.

        Args:
            seconds: Between two looks at the log.
        """
        with self.log.open(errors="replace") as log:
            log.seek(self._offset)
            part = ""
            while True:
                ended = self.pid is None
                *lines, part = (part + log.read()).split("\n")
                yield from lines
                if ended:
                    return
                time.sleep(seconds)


def family(mark: str, root: int) -> list[psutil.Process]:
    """The living processes of a service.

    Args:
        mark: Stands in their environment.
        root: The process that was started, which is also the number of its session.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == root or mark in process.environ().get(MARK, "").split(":"):
                found[process.pid] = process
    for process in list(found.values()):  # a process that sets its title may have overwritten its environment
        with contextlib.suppress(psutil.Error):
            found |= {child.pid: child for child in process.children(recursive=True)}
    return [process for process in found.values() if _is_alive(process)]


def kill_family(mark: str, root: int) -> None:
    """Kill the processes of a service, and what they start meanwhile, sparing the caller."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        processes = [process for process in family(mark, root) if process.pid != os.getpid()]
        if not processes:
            return
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)  # psutil's own wait would take the exit code of a child from its `Popen`


def end_with_parent() -> None:
    """In a tied service: kill all its processes as soon as the process that started it is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        kill_family(os.environ[MARK].rpartition(":")[2], os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Leave by SystemExit(143) on SIGTERM, so that what must be ended is ended then too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def tool(name: str) -> str:
    """The path of a command installed beside this Python, else its name for the PATH to find."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else name


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
