"""The audit log: what changes it is seen, and what a crash leaves of it is not taken for a change."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.privacy import audit_log
from bora_fl.privacy.audit_log import AuditLogError, append, code_digest, verify
from bora_fl.simulations.engine import simulate
from bora_fl.wire.schema import REPLY


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "audit.jsonl"
    for number in range(4):
        append(path, kind="train", number=number)
    return path


def test_what_is_appended_is_there_in_order_and_chained(log: Path):
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [0, 1, 2, 3, 4]
    assert [entry.get("number") for entry in entries] == [None, 0, 1, 2, 3]
    assert entries[1]["code"] == code_digest()
    found = verify(log)
    assert (found.lines, found.problem, found.note) == (5, "", "")
    before = found.last
    append(log, kind="evaluate")
    assert json.loads(log.read_text().splitlines()[-1])["previous"] == before
    assert verify(log, expected=before).problem == ""


def test_two_logs_have_nothing_in_common(tmp_path: Path):
    for name in ("a", "b"):
        append(tmp_path / name)
    first, second = (json.loads((tmp_path / name).read_text().splitlines()[0])["genesis"] for name in ("a", "b"))
    assert first != second


def test_every_bit_counts(log: Path):
    whole = log.read_bytes()
    lines = whole.count(b"\n")
    for position in range(0, len(whole), 5):
        spoiled = bytearray(whole)
        spoiled[position] ^= 0x04
        log.write_bytes(spoiled)
        line = whole[:position].count(b"\n") + 1
        found = verify(log)
        last = position == len(whole) - 1  # the end of the last line
        assert found.problem, position
        assert last or any(f"line {n} " in found.problem for n in (line, line + 1)), (line, found)
        assert found.lines <= lines
    log.write_bytes(whole)
    assert not verify(log).problem


@pytest.mark.parametrize("removed", [0, 1, 2, 3, 4])
def test_a_line_that_was_taken_away_is_missed(removed: int, log: Path):
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(line for number, line in enumerate(lines) if number != removed))
    found = verify(log)
    assert f"line {removed + 1}" in found.problem or "it ends after line 4; its head says 5" in found.problem


def test_lines_that_change_places_are_seen(log: Path):
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2], lines[3] = lines[3], lines[2]
    log.write_bytes(b"".join(lines))
    assert "line 3 does not follow" in verify(log).problem


def test_a_line_cut_off_by_a_crash_is_told_apart_and_gone_on_after(log: Path):
    whole = log.read_bytes()
    with log.open("ab") as file:
        file.write(b'{"line": 5, "ti')
    found = verify(log)
    assert (found.lines, found.problem) == (5, "")
    assert "line 6 was cut off" in found.note
    append(log, kind="train")
    assert log.read_bytes().startswith(whole)
    assert json.loads(log.read_text().splitlines()[-1])["cut-off-bytes"] == 15
    assert verify(log) == verify(log, verify(log).last)
    assert verify(log).lines == 6


def test_a_crash_before_the_head_is_no_change(log: Path):
    head = log.with_name("audit.jsonl.head")
    before = head.read_bytes()
    append(log, kind="train")
    head.write_bytes(before)
    found = verify(log)
    assert found.problem == ""
    assert "the head is 1 lines behind" in found.note
    append(log, kind="train")
    assert verify(log).note == ""


def test_a_cut_off_line_that_the_head_counted_was_taken_away(log: Path):
    log.write_bytes(log.read_bytes()[:-10])
    assert "its head says 5" in verify(log).problem
    with pytest.raises(AuditLogError, match="it holds 4 lines, its head says 5"):
        append(log, kind="train")


def test_without_its_head_a_shortened_log_is_seen_by_a_digest_from_before(log: Path):
    last = verify(log).last
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    log.with_name("audit.jsonl.head").unlink()
    assert verify(log).problem == ""
    assert "there is no head" in verify(log).note
    assert "no line has the expected digest" in verify(log, last).problem


def test_a_changed_last_line_is_not_gone_on_from(log: Path):
    log.write_bytes(log.read_bytes().replace(b'"number": 3', b'"number": 9'))
    assert "line 5 is not the one that the head names" in verify(log).problem
    with pytest.raises(AuditLogError, match="line 5 is not the one"):
        append(log, kind="train")


def test_a_log_that_is_gone_is_not_begun_anew(log: Path):
    log.unlink()
    with pytest.raises(AuditLogError, match="it is empty, its head says 5 lines"):
        append(log, kind="train")


def test_a_full_disk_leaves_the_log_whole(log: Path, monkeypatch: pytest.MonkeyPatch):
    before = log.read_bytes()
    real = os.write

    def fill(descriptor: int, data: bytes) -> int:
        if len(data) > 20 and b'"line"' in data:
            return real(descriptor, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit_log.os, "write", fill)
        with pytest.raises(AuditLogError, match=r"cannot be written .*No space left"):
            append(log, kind="train")
    assert log.read_bytes() == before
    append(log, kind="train")
    assert verify(log).lines == 6


def test_many_append_at_once(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: append(path, number=number), range(20)))
    assert verify(path).lines == 21
    numbers = [json.loads(line).get("number") for line in path.read_text().splitlines()[1:]]
    assert sorted(numbers) == list(range(20))


def test_long_lines_are_found_again(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    for size in (10, 5_000, 100_000, 10):
        append(path, text="x" * size)
    assert verify(path).lines == 5


def test_the_log_is_its_owner_s_alone(log: Path):
    assert log.parent.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in log.parent.iterdir()} == {0o600}


def test_the_code_s_digest_is_that_of_its_files(tmp_path: Path):
    import bora_fl

    package = Path(bora_fl.__file__).parent
    assert len(code_digest()) == 64
    wheel = tmp_path / "bora_fl"  # as installed from a wheel: kernels and simulations inside
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, wheel, ignore=skip)
    for name in ("kernels", "simulations"):
        shutil.copytree(package.parent / name, wheel / name, ignore=skip)
    code = "from bora_fl.privacy.audit_log import code_digest; print(code_digest())"

    def there() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert there() == code_digest()
    with (wheel / "seeds.py").open("a") as file:
        file.write("# changed\n")
    assert there() not in ("", code_digest())


def test_the_command_says_ok_or_the_first_broken_line(log: Path):
    done = CliRunner().invoke(cli, ["audit-log", "verify", str(log)])
    assert done.exit_code == 0
    assert f"ok: 5 lines, last {verify(log).last}" in done.output
    log.write_bytes(log.read_bytes().replace(b'"number": 1', b'"number": 7'))
    done = CliRunner().invoke(cli, ["audit-log", "verify", str(log)])
    assert done.exit_code == 1
    assert "broken: line 4 does not follow from line 3" in done.output


def test_site_and_server_log_the_same_replies(tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("BORA_FL_STATE", str(tmp_path / "state"))
    folder = simulate(tiny_config | {"run.num-rounds": 2, "head.init": "auto", "run.keep-best": True}, 3)
    at_server, at_site = folder / "audit.jsonl", tmp_path / "state" / "audit.jsonl"
    assert (verify(at_server).lines, verify(at_server).problem) == (4, "")
    assert (verify(at_site).lines, verify(at_site).problem) == (22, "")
    sent = [json.loads(line) for line in at_site.read_text().splitlines()[1:]]
    received = [json.loads(line) for line in at_server.read_text().splitlines()[1:]]
    assert [len(entry["replies"]) for entry in received] == [6, 3, 12]
    assert {entry["reply"] for entry in sent} == {reply for entry in received for reply in entry["replies"].values()}
    assert {(entry["kind"], entry["outcome"]) for entry in sent} == {
        (kind, "released") for kind in ("train", "evaluate", "head-statistics", "head-losses")
    }
    asked = {key.partition(" ")[2] for entry in received for key in entry["replies"]}
    assert asked == {"", "evaluate", "head-statistics", "head-losses"}
    assert {entry["run"] for entry in sent} == {entry["run"] for entry in received}
    assert [entry["partition"] for entry in sent] == ["0", "1", "2"] * 7


def test_a_site_that_cannot_log_lets_nothing_out(tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: Any):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BORA_FL_STATE", str(tmp_path / "file"))
    left = []

    def watch(message: Any, partition: int) -> Any:
        left.append(message.content)
        return message

    with pytest.raises(Exception, match="audit log cannot be written"):
        simulate(tiny_config, 3, tamper=watch)
    assert [list(content) for content in left] == [[REPLY]] * 3
    assert str(tmp_path) not in str(left)


def test_charges_are_logged(tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("BORA_FL_STATE", str(tmp_path / "state"))
    private = {"privacy.mode": "record", "privacy.accountant": "rdp", "strategy.weighting": "uniform"}
    simulate(tiny_config | private | {"run.num-rounds": 1}, 3)
    for line in (tmp_path / "state" / "audit.jsonl").read_text().splitlines()[1:]:
        assert 0 < float(json.loads(line)["charge"]["epsilon-per-record"]) <= 8
