"""The lifecycle of a child process, shown on shells and small Python programs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bora_fl.deployment import processes
from bora_fl.deployment.processes import Service, exit_on_sigterm

ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def shell(script: str, folder: Path) -> Service:
    return Service("shell", ["sh", "-c", script], folder, ENVIRONMENT)


def test_a_killed_service_takes_its_descendants_along_and_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(processes, "RESTART_SECONDS", 0.0)
    service = shell("sleep 60 & echo $!; wait", tmp_path)
    service.start()
    until(service.text)
    child = int(service.text())
    service.kill()
    assert not alive(child)
    service.tend()
    assert service.pid is None  # who was killed stays down
    service.start()
    psutil.Process(service.pid).kill()
    assert service.wait(10) is not None
    service.tend()
    assert service.pid is not None  # who ended is started again
    service.stop()
    assert service.pid is None


@pytest.mark.parametrize("end", [Service.stop, Service.kill])
def test_an_orphan_in_a_session_of_its_own_is_ended_too(end: Callable[[Service], None], tmp_path: Path):
    service = shell("setsid sh -c 'sleep 60 & echo $!; wait' & sleep 0.2", tmp_path)
    service.start()
    until(service.text)
    assert service.wait(10) == 0
    orphan = int(service.text())
    assert alive(orphan)
    end(service)
    assert not alive(orphan)


def test_a_service_s_services_end_with_it(tmp_path: Path):
    inner = f"""
from pathlib import Path; from bora_fl.deployment.processes import Service; import time
s = Service("inner", ["sleep", "60"], Path({str(tmp_path)!r}), {{"PATH": "/usr/bin:/bin"}})
s.start(); print(s.pid, flush=True); time.sleep(60)
"""
    service = Service("outer", [sys.executable, "-c", inner], tmp_path, dict(os.environ))
    service.start()
    until(service.text)
    pid = int(service.text())
    service.kill()
    assert not alive(pid)


def test_who_does_not_listen_is_ended_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.3)
    service = shell("trap '' TERM; echo up; while :; do sleep 0.1; done", tmp_path)
    service.start()
    until(service.text)
    service.stop()
    assert service.wait(0) == -signal.SIGKILL


def test_lines_come_as_they_are_written_until_the_end(tmp_path: Path):
    (tmp_path / "shell.log").write_text("of an earlier start\n")
    service = shell("printf 'a\\nb'; sleep 0.3; printf 'c\\nd\\n'", tmp_path)
    service.start()
    lines = service.follow(0.05)
    assert next(lines) == "a"
    assert service.pid is not None
    assert list(lines) == ["bc", "d"]
    assert service.text() == "a\nbc\nd\n"
    assert service.tail(2) == "bc\nd"


PARENT = """
import os, sys, time
from pathlib import Path
from bora_fl.deployment.processes import Service
child = '''
import subprocess, time
from bora_fl.deployment.processes import end_with_parent
end_with_parent()
print(subprocess.Popen(["setsid", "sleep", "60"]).pid, flush=True)
time.sleep(60)
'''
service = Service("child", [sys.executable, "-c", child], Path(sys.argv[1]), dict(os.environ), tied=True)
service.start()
print(service.pid, flush=True)
time.sleep(60)
"""


def test_a_tied_service_and_its_descendants_end_when_its_parent_is_killed(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        log = tmp_path / "child.log"
        until(lambda: log.read_text().strip())
        grandchild = int(log.read_text())
        assert alive(grandchild)
        parent.kill()
    until(lambda: not alive(pid) and not alive(grandchild), 10)


def test_sigterm_leaves_by_an_exception_and_only_inside():
    before = signal.getsignal(signal.SIGTERM)
    code: object = None
    with exit_on_sigterm():
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit as left:
            code = left.code
    assert code == 143
    assert signal.getsignal(signal.SIGTERM) is before
