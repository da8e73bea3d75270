"""A log of what has left a site or come of a round, to which lines can be added and from which none can be taken.

One JSON object a line. The first, the genesis, holds a random number; each other line holds the SHA-256 digest of the
line before it, so that a line that is changed, removed or moved breaks the chain there. Beside the log stands its head:
how many lines there are and the digest of the last one, from which a shortened log is seen. Who can rewrite log and
head alike can rewrite both whole: write the last digest down elsewhere from time to time, as `bora-fl audit-log verify`
prints it, and give it to a later `verify`.
"""

import hashlib
import importlib.util
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

import bora_fl
from bora_fl.paths import write_atomically

AUDIT_LOG = "audit.jsonl"
LOCK_SECONDS = 60.0


class AuditLogError(OSError):
    """A line could not be added to the log; what it was to record must not go on."""


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        lines: Whole lines whose chain holds, from the first on.
        last: Digest of the last of them.
        problem: Why the log is not as it was written; empty if it is.
        note: What a crash explains: a last line that was cut off, or a head that is behind.
    """

    lines: int
    last: str
    problem: str = ""
    note: str = ""


def append(path: Path, **event: Any) -> None:
    """Add a line for an event, on disk when this returns.

    The code's digest and the time are added to the event. What a crash has left of a last line is cut off, and the new
    line says how many bytes that were. Processes may append at once.

    Args:
        path: The log; it is made, readable by its owner alone, if it is missing.
        **event: Names and values that JSON can hold.

    Raises:
        AuditLogError: If the line cannot be written, or the log is shorter than its head says.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS, mode=0o600):
            _append(path, event)
    except OSError as error:
        raise AuditLogError(f"the audit log {path} cannot be written ({error})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise AuditLogError(f"the audit log {path} cannot be gone on with ({error}); verify it") from error


def _append(path: Path, event: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        os.fchmod(descriptor, 0o600)
        last, cut_off = _last_line(file)
        head = _read_head(path)
        if last is None:
            if head:
                raise ValueError(f"it is empty, its head says {head[0]} lines")
            last = _line({"line": 0, "time": _now(), "genesis": secrets.token_hex(32)})
            whole = last
        else:
            whole = b""
        number = int(json.loads(last)["line"]) + 1
        if head and head[0] > number:
            raise ValueError(f"it holds {number} lines, its head says {head[0]}")
        if head and head[0] == number and head[1] != _digest(last):
            raise ValueError(f"line {number} is not the one that the head names")
        if cut_off:
            file.truncate(os.fstat(descriptor).st_size - cut_off)
            event = event | {"cut-off-bytes": cut_off}
        entry = {"line": number, "time": _now(), **event, "code": code_digest(), "previous": _digest(last)}
        line = _line(entry)
        size = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, whole + line)
        except OSError:
            file.truncate(size)  # a full disk takes half a line
            raise
        os.fsync(descriptor)
    head_content = json.dumps({"lines": number + 1, "last": _digest(line)})
    write_atomically(_head_path(path), head_content + "\n", mode=0o600)


def verify(path: Path, expected: str = "") -> Verdict:
    """Check a log from its first line to its last.

    Args:
        path: The log.
        expected: A digest that an earlier `verify` gave; it must be that of one of the lines.

    Returns:
        What was found; `problem` names the first broken line.

    Raises:
        OSError: If the log cannot be read.
        ValueError: If its head cannot be read.
    """
    count, last, seen, note = 0, "", set(), ""
    for line, ended in _lines(path):
        try:
            entry = json.loads(line)
            fits = entry["line"] == count and (entry["previous"] == last if count else len(entry["genesis"]) == 64)
        except (ValueError, TypeError, KeyError):
            if not ended:
                note = f"line {count + 1} was cut off while it was written, as by a crash"
                break
            return Verdict(count, last, f"line {count + 1} cannot be read: it was changed")
        if not ended:
            note = f"line {count + 1} was cut off while it was written, as by a crash"
            break
        if not fits:
            return Verdict(count, last, f"line {count + 1} does not follow from line {count}: one of them was changed")
        count, last = count + 1, _digest(line)
        seen.add(last)
    head = _read_head(path)
    if head and head[0] > count:
        return Verdict(count, last, f"it ends after line {count}; its head says {head[0]}: lines were taken away", note)
    if head and head[0] == count and head[1] != last:
        return Verdict(count - 1, last, f"line {count} is not the one that the head names: it was changed")
    if head and head[1] not in seen:
        return Verdict(count, last, f"line {head[0]} is not the one that the head names: it was changed", note)
    if expected and expected not in seen:
        return Verdict(count, last, "no line has the expected digest: lines were taken away or changed", note)
    if head is None and count:
        note = note or "there is no head: lines that were taken from the end are not seen without an expected digest"
    if head and head[0] < count:
        note = note or f"the head is {count - head[0]} lines behind, as after a crash"
    return Verdict(count, last, note=note)


@cache
def code_digest() -> str:
    """SHA-256 over the package's Python files as they are installed here: the same code has the same digest."""
    package = Path(bora_fl.__file__).parent
    files = {file.relative_to(package).as_posix(): file for file in package.rglob("*.py")}
    for name in ("kernels", "simulations"):  # they stand beside the package in a checkout, inside it in a wheel
        spec = importlib.util.find_spec(f"bora_fl.{name}")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            files |= {f"{name}/{f.relative_to(folder).as_posix()}": f for f in Path(folder).rglob("*.py")}
    result = hashlib.sha256()
    for relative, file in sorted(files.items()):
        result.update(f"{relative}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return result.hexdigest()


def _lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Each line without its end, and whether it has one."""
    with path.open("rb") as file:
        for line in file:
            yield line.removesuffix(b"\n"), line.endswith(b"\n")


def _last_line(file: Any) -> tuple[bytes | None, int]:
    """The last whole line, with its end, and the number of bytes after it."""
    size = file.seek(0, os.SEEK_END)
    reach = 1 << 12
    while True:
        start = max(0, size - reach)
        file.seek(start)
        tail = file.read(size - start)
        body, end, rest = tail.rpartition(b"\n")
        before = body.rfind(b"\n")
        if end and (before >= 0 or start == 0):
            return body[before + 1 :] + b"\n", len(rest)
        if start == 0:
            return None, size
        reach *= 8


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _digest(line: bytes) -> str:
    return hashlib.sha256(line.removesuffix(b"\n")).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _head_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _read_head(path: Path) -> tuple[int, str] | None:
    try:
        head = json.loads(_head_path(path).read_text())
        return int(head["lines"]), str(head["last"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{_head_path(path)} cannot be read ({error})") from error
