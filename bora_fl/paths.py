"""Where files go, and the one way in which a file that must be whole is written."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """What can be made again: converted models, fetched data. ``$BORA_FL_CACHE``, else ``~/.cache/bora_fl``."""
    return Path(os.environ.get("BORA_FL_CACHE") or Path.home() / ".cache" / "bora_fl").expanduser()


def state_folder() -> Path:
    """What must outlive a process, such as ledgers: ``$BORA_FL_STATE``, else ``~/.local/state/bora_fl``."""
    return Path(os.environ.get("BORA_FL_STATE") or Path.home() / ".local" / "state" / "bora_fl").expanduser()


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
