"""The pool runs `eval` on text: a function that any process finds, and that can do whatever a test needs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bora_fl.simulations.pool import Died, Pool, run_all

SLEEP = "__import__('time').sleep(0.3) or ''"


def run(tasks: list[str], workers: int = 1, environment: dict[str, str] | None = None) -> dict[str, str]:
    found: dict[str, str] = {}
    run_all(tasks, eval, workers, environment=environment or {}, on_done=found.__setitem__, tick_seconds=0.05)
    return found


def test_a_dying_worker_loses_one_task():
    tasks = [
        "''",
        "__import__('os').kill(__import__('os').getpid(), 9)",
        "'a reason'",
        "__import__('os')._exit(3)",
        "'b'",
    ]
    found = run(tasks)
    assert list(found) == tasks  # one worker, so in order
    assert (found[tasks[0]], found[tasks[2]], found[tasks[4]]) == ("", "a reason", "b")
    assert "SIGKILL" in found[tasks[1]]
    assert "--workers" in found[tasks[1]]
    assert "exit code 3" in found[tasks[3]]


def test_a_worker_that_is_ended_while_it_exits_says_nothing(capfd: pytest.CaptureFixture[str]):
    with Pool(eval, 1, environment={}) as pool:
        pool.run(["__import__('atexit').register(__import__('time').sleep, 20) and 0"], lambda *_: None)
        (worker,) = pool._workers
        worker.connection.close()
        time.sleep(1)  # it has seen that no task will come, and is about to exit
    assert capfd.readouterr().err == ""


def test_workers_keep_their_memory_and_get_the_environment():
    remember = (
        "setattr(__import__('sys'), 'kept', getattr(__import__('sys'), 'kept', '') + 'x') or __import__('sys').kept"
    )
    variable = "__import__('os').environ['BORA_FL_POOL_TEST']"
    found = run([remember, f"{remember} ", variable], environment={"BORA_FL_POOL_TEST": "seen"})
    assert found[remember] == "x"
    assert found[f"{remember} "] == "xx"
    assert found[variable] == "seen"
    assert "BORA_FL_POOL_TEST" not in os.environ


LONG = """
import os, sys, tempfile
from bora_fl.simulations import pool
pool._SHORT = sys.argv[1]
if __name__ == "__main__":
    found = {}
    with pool.Pool(eval, 1, environment={}, preload=[]) as workers:
        workers.run(["1 + 1"], found.__setitem__)
    print(workers._method, found["1 + 1"], tempfile.gettempdir() == os.environ["TMPDIR"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
@pytest.mark.parametrize("short", ["/tmp", "/nowhere"])
def test_workers_start_where_the_temporary_folder_has_too_long_a_name_for_a_socket(short: str, tmp_path: Path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    (tmp_path / "script.py").write_text(LONG)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), short],
        env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["forkserver" if short == "/tmp" else "spawn", "2", "True"], done.stderr
    assert not list(folder.iterdir())


def test_an_interruption_ends_the_workers():
    pids: list[int] = []

    def interrupt(task: str, reason: str) -> None:
        pids.append(int(reason))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(["str(__import__('os').getpid())", SLEEP], eval, 1, environment={}, on_done=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_ticks_tell_what_is_under_way():
    seen: list[list[str]] = []
    run_all([SLEEP], eval, 2, environment={}, on_done=lambda *_: None, on_tick=seen.append, tick_seconds=0.05)
    assert seen
    assert all(running == [SLEEP] for running in seen)


def test_an_interrupted_task_cleans_up_what_it_started(tmp_path: Path):
    """Its clean-up runs when the pool ends it, and when the pool's own process is killed."""
    task = (
        'exec(\'import pathlib, time\\ntry: pathlib.Path(PATH, "begun").touch(); time.sleep(60)'
        '\\nfinally: pathlib.Path(PATH, "cleaned").touch()\')'
    ).replace("PATH", repr(str(tmp_path)).replace("'", '\\"'))

    def interrupt(_: list[str]) -> None:
        if (tmp_path / "begun").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([task], eval, 1, environment={}, on_done=lambda *_: None, on_tick=interrupt, tick_seconds=0.05)
    assert (tmp_path / "cleaned").exists()

    (tmp_path / "begun").unlink()
    (tmp_path / "cleaned").unlink()
    code = (
        "from bora_fl.simulations.pool import run_all\n"
        f"if __name__ == '__main__': run_all([{task!r}], eval, 1, environment={{}}, on_done=print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    _until((tmp_path / "begun").exists)
    parent.kill()
    parent.wait()
    _until((tmp_path / "cleaned").exists)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_do_not_execute_the_script_that_starts_them(tmp_path: Path):
    (tmp_path / "script.py").write_text(
        "print('again', flush=True)\nfrom bora_fl.simulations.pool import Pool\n"
        "for preload in (None, ['json']):\n"
        "    with Pool(eval, 1, environment={}, preload=preload) as pool:\n"
        "        pool.run(['6 * 7'], lambda _, result: print(result, flush=True))\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["again", "42", "42"]


PID = "str(__import__('os').getpid())"
PLACE = "__import__('os').environ['BORA_FL_POOL_PLACE']"


@pytest.mark.parametrize("preload", [None, ["json"]], ids=["spawned", "forked"])
def test_workers_outlive_a_run_and_one_that_dies_is_replaced_in_its_place(preload: list[str] | None):
    found: list[object] = []
    places = [{"BORA_FL_POOL_PLACE": "first"}]
    with Pool(eval, 1, environment={}, places=places, preload=preload) as pool:
        for task in (PID, PID, "__import__('os')._exit(3)", PID, PLACE):
            pool.run([task], lambda _, result: found.append(result))
    assert found[0] == found[1] != found[3]
    assert found[2] == Died("the worker process died (exit code 3)")
    assert found[4] == "first"
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(found[3])), 0)
