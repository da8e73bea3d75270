"""Where files go, the one way in which a file that must be whole is written, and how damage to it is seen."""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """What can be made again: converted models, fetched data. ``$BORA_FL_CACHE``, else ``~/.cache/bora_fl``."""
    return Path(os.environ.get("BORA_FL_CACHE") or Path.home() / ".cache" / "bora_fl").expanduser()


def state_folder() -> Path:
    """What must outlive a process, such as ledgers: ``$BORA_FL_STATE``, else ``~/.local/state/bora_fl``."""
    return Path(os.environ.get("BORA_FL_STATE") or Path.home() / ".local" / "state" / "bora_fl").expanduser()


@contextmanager
def state_in(folder: Path) -> Iterator[None]:
    """Let this process keep its state in a folder of its own, as for a simulation that is no real site."""
    before = os.environ.get("BORA_FL_STATE")
    os.environ["BORA_FL_STATE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("BORA_FL_STATE")
        if before is not None:
            os.environ["BORA_FL_STATE"] = before


def write_atomically(path: Path, content: bytes | str, *, mode: int = 0o666) -> None:
    """Write a file so that a reader, and a machine that loses power, see the old content or the new one whole.

    On return the content is on the device. Concurrent writers do not disturb each other: the last one wins.

    Args:
        path: The file; missing folders are made.
        content: Text is written as UTF-8.
        mode: Permissions of the file, less the process's umask; ``0o600`` for what its owner alone may read.

    Raises:
        OSError: If it cannot be written; the old content then stands.
    """
    with atomically(path) as part:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or a folder to, and move it into place at the end.

    What was written is flushed to the device first. A file replaces the one that was there, and so does a folder. If
    the body raises, what it wrote is deleted and the old content stands. A process that is killed leaves
    ``.NAME.<process>-<thread>.part`` behind, which nothing reads; a sole writer may delete ``.*.part``.

    Args:
        path: Where the file or folder belongs; missing parent folders are made.

    Yields:
        A path that does not exist yet, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    delete(part)
    try:
        yield part
        for inside in (*part.rglob("*"), part):
            _flush(inside)
        if part.is_dir() and path.is_dir():
            old = part.with_suffix(".old")
            delete(old)
            path.rename(old)
            part.rename(path)
            delete(old)
        else:
            part.replace(path)
        _flush(path.parent)
    finally:
        delete(part)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def path_part(text: str) -> str:
    """Return a name that came from elsewhere, such as a run's id, if it may be one part of a path.

    Raises:
        ValueError: Unless it is 1 to 64 letters, digits, hyphens and underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text, re.ASCII):
        raise ValueError(f"{text[:80]!r} is no name for a file: use 1 to 64 letters, digits, hyphens and underscores")
    return text


def digest(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(path: Path, files: Iterable[Path]) -> None:
    """Write a list of SHA-256 digests, in the form that ``sha256sum --check`` reads.

    Args:
        path: The list.
        files: What it lists: files in the list's folder or below it.
    """
    lines = [f"{digest(file)}  {file.relative_to(path.parent)}\n" for file in sorted(files)]
    write_atomically(path, "".join(lines))


def damaged(path: Path, files: Iterable[Path]) -> list[str]:
    """What is not as it was when `write_digests` listed it: names of files that are missing or have other content.

    Args:
        path: The list.
        files: What is listed now, as it is, if there is no list yet and one can be written.
    """
    if not path.is_file():
        with suppress(OSError):
            write_digests(path, files)
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        file = path.parent / name if name else path
        if not file.is_file() or digest(file) != expected:
            found.append(name or path.name)
    return found


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
