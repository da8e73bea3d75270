"""Worker processes that keep their memory from task to task; a worker that dies takes one task with it, no more.

They talk over pipes: nothing listens on a port. Where Python can fork them from a small server process that has
imported the large libraries (Linux), they start in no time and share that memory; that server listens on a Unix socket
of mode 0600 in a folder of mode 0700.
"""

import contextlib
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType, TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

from bora_fl.client.worker.address import LONGEST_PATH

Task = TypeVar("Task")
_CLEAN_UP_SECONDS = 30.0
_SHORT = "/tmp"
_SOCKET = "/listener-12345678"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Died:
    """The worker process died at a task."""

    reason: str


@dataclass
class _Worker(Generic[Task]):
    place: int
    process: BaseProcess
    connection: "Connection[Any, Any]"
    task: Task | None = None


class Pool(Generic[Task, Result]):
    """Worker processes; a context manager that ends them.

    Args:
        work: A module-level function that does a task in a worker.
        workers: Processes at once.
        environment: Variables that workers start with.
        places: More variables for the worker in each place; one that replaces a dead one takes its place.
        prepare: A module-level function that each worker calls first.
        preload: Modules to import before workers are forked; None starts each worker in an interpreter of its own.
    """

    def __init__(
        self,
        work: Callable[[Task], Result],
        workers: int,
        *,
        environment: Mapping[str, str],
        places: Sequence[Mapping[str, str]] = (),
        prepare: Callable[[], None] | None = None,
        preload: list[str] | None = None,
    ) -> None:
        self._work, self._size, self._environment, self._prepare = work, workers, environment, prepare
        self._places = list(places) or [{}] * workers
        self._method: Literal["forkserver", "spawn"] = "spawn"
        can_fork = "forkserver" in multiprocessing.get_all_start_methods()
        if preload is not None and can_fork and _socket_fits():
            self._method = "forkserver"
            multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
        self._workers: list[_Worker[Task]] = []

    def start(self, count: int | None = None) -> None:
        """Start workers, all by default, where they are missing."""
        missing = set(range(self._size if count is None else min(count, self._size)))
        for place in sorted(missing - {worker.place for worker in self._workers}):
            self._workers.append(self._start(place))

    def run(
        self,
        tasks: Sequence[Task],
        on_done: Callable[[Task, Result | Died], None],
        on_tick: Callable[[list[Task]], None] = lambda running: None,
        tick_seconds: float = 0.5,
        timeout: float = math.inf,
    ) -> None:
        """Run all tasks, in order as far as workers are free.

        Args:
            tasks: Picklable tasks.
            on_done: Called here with each task and its result.
            on_tick: Called here every now and then with the tasks under way.
            tick_seconds: How often.
            timeout: Seconds after which the workers that are still at a task are ended, and the rest is not begun.
        """
        waiting, deadline = deque(tasks), time.monotonic() + timeout
        while waiting or any(worker.task is not None for worker in self._workers):
            if time.monotonic() > deadline:
                self._give_up([*waiting], on_done, f"not done within {timeout:g} s")
                return
            if waiting:
                busy = sum(worker.task is not None for worker in self._workers)
                self.start(busy + len(waiting))
            for worker in self._workers:
                if worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    with contextlib.suppress(OSError):  # it died while idle: noticed below, and said of this task
                        worker.connection.send(worker.task)
            at_work = [worker for worker in self._workers if worker.task is not None]
            wait([worker.connection for worker in at_work], timeout=tick_seconds)
            on_tick([worker.task for worker in at_work if worker.task is not None])
            for worker in at_work:
                if worker.task is None or not worker.connection.poll():
                    continue
                result: Result | Died = self._receive(worker)
                task, worker.task = worker.task, None
                if isinstance(result, Died):
                    self._workers.remove(worker)
                on_done(task, result)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        self._end(self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _give_up(self, waiting: Sequence[Task], on_done: Callable[[Task, Result | Died], None], reason: str) -> None:
        at_work = [worker for worker in self._workers if worker.task is not None]
        self._end(at_work)
        for task in [*(worker.task for worker in at_work if worker.task is not None), *waiting]:
            on_done(task, Died(reason))

    def _end(self, workers: Sequence[_Worker[Task]]) -> None:
        for worker in workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
        self._workers = [worker for worker in self._workers if worker not in workers]

    def _receive(self, worker: _Worker[Task]) -> Any:
        try:
            return worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            short = "; it may have been short of memory: use fewer --workers, or more --cpus a client"
            return Died(f"the worker process died ({how}){short if code == -signal.SIGKILL else ''}")

    def _start(self, place: int) -> _Worker[Task]:
        context: Any = multiprocessing.get_context(self._method)
        here, there = context.Pipe()
        variables = {**self._environment, **self._places[place]}
        process = context.Process(target=_serve, args=(there, self._work, self._prepare, variables), daemon=True)
        with _environment(self._environment), _without_script():
            process.start()
        there.close()  # so that the end of the process is the end of the pipe
        return _Worker(place, process, here)


def run_all(
    tasks: Sequence[Task],
    work: Callable[[Task], str],
    workers: int,
    *,
    environment: Mapping[str, str],
    on_done: Callable[[Task, str], None],
    on_tick: Callable[[list[Task]], None] = lambda running: None,
    tick_seconds: float = 0.5,
) -> None:
    """Run all tasks in a pool that ends with them.

    Args:
        tasks: See `Pool.run`.
        work: Runs a task in a worker; returns why it failed, or an empty string.
        workers: See `Pool`.
        environment: See `Pool`.
        on_done: Called here with each task and why it failed, which may be that its process died.
        on_tick: See `Pool.run`.
        tick_seconds: See `Pool.run`.
    """
    with Pool(work, workers, environment=environment) as pool:
        pool.run(
            tasks,
            lambda task, result: on_done(task, result.reason if isinstance(result, Died) else result),
            on_tick,
            tick_seconds,
        )


def _socket_fits() -> bool:
    """Whether the path of the forking server's socket fits into an address.

    It stands in a folder that multiprocessing makes, once, in the temporary folder; ``/tmp`` takes its place if that
    has too long a name.
    """
    usual = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_PATH - len("/pymp-12345678") - len(_SOCKET):
        tempfile.tempdir = _SHORT
    try:
        return len(os.fsencode(multiprocessing.util.get_temp_dir())) + len(_SOCKET) <= LONGEST_PATH
    except OSError:
        return False
    finally:
        tempfile.tempdir = usual


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Let processes start without the script that runs here, which they would execute: no task is defined in it."""
    script = sys.modules["__main__"]
    if not (script.__spec__ and script.__spec__.name.startswith("bora_fl.")):
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _serve(
    connection: "Connection[Any, Any]",
    work: Callable[[Any], Any],
    prepare: Callable[[], None] | None,
    environment: Mapping[str, str],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # a task's clean-up runs, and ends the processes it started
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    if prepare:
        prepare()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            # There is nothing to clean up, and an exit that is cut short would print a traceback.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return
        connection.send(work(task))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # an orphan would go on writing where the next command writes
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_CLEAN_UP_SECONDS)
        os._exit(1)
