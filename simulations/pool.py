"""Worker processes that keep their memory from task to task; a worker that dies takes one task with it, no more."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
_CLEAN_UP_SECONDS = 30.0


@dataclass
class _Worker(Generic[Task]):
    process: SpawnProcess
    connection: "Connection[Any, Any]"
    task: Task | None = None


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
    """Run all tasks, in order as far as workers are free.

    Args:
        tasks: Picklable tasks.
        work: A module-level function that runs a task in a worker; returns why it failed, or an empty string.
        workers: Processes at once.
        environment: Variables that workers start with.
        on_done: Called here with each task and why it failed, which may be that its process died.
        on_tick: Called here every now and then with the tasks under way.
        tick_seconds: How often.
    """
    waiting, pool = deque(tasks), list[_Worker[Task]]()
    try:
        while waiting or any(worker.task is not None for worker in pool):
            while waiting and len(pool) < workers:
                pool.append(_start(work, environment))
            for worker in pool:
                if worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    with contextlib.suppress(OSError):  # it died while idle: noticed below, and said of this task
                        worker.connection.send(worker.task)
            busy = [worker for worker in pool if worker.task is not None]
            wait([worker.connection for worker in busy], timeout=tick_seconds)
            on_tick([worker.task for worker in busy if worker.task is not None])
            for worker in busy:
                reason = _reply(worker)
                if reason is None or worker.task is None:
                    continue
                task, worker.task = worker.task, None
                if not worker.process.is_alive():
                    pool.remove(worker)
                on_done(task, reason)
    finally:
        for worker in pool:
            worker.connection.close()
            worker.process.terminate()
            worker.process.join()


def _reply(worker: _Worker[Task]) -> str | None:
    """Why the worker's task failed, empty if it did not, None if it is under way."""
    try:
        return str(worker.connection.recv()) if worker.connection.poll() else None
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; it may have been short of memory: use fewer --workers" if code == -signal.SIGKILL else ""
        return f"the worker process died ({how}){hint}"


def _start(work: Callable[[Task], str], environment: Mapping[str, str]) -> _Worker[Task]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, work), daemon=True)
    with _environment(environment):
        process.start()
    there.close()  # so that the end of the process is the end of the pipe
    return _Worker(process, here)


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


def _serve(connection: "Connection[Any, Any]", work: Callable[[Any], str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # a task's clean-up runs, and ends the processes it started
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(work(task))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # an orphan would go on writing where the next command writes
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_CLEAN_UP_SECONDS)
        os._exit(1)
