"""Base deltas on a site's disk: in a deployment the next message meets a new process.

A server must not fill a site's disk. What is kept is what the site's model can use: deltas of its adapted layers, each
no larger than the layer's weight in float32, of no later version than the message is of; and of all runs together no
more than the site's policy has room for, or half of what would be free without them. Other runs' go first, which are
sent again where they are needed.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from bora_fl.paths import cache_folder, delete, path_part, write_atomically
from bora_fl.state import PARTS
from bora_fl.wire.refusals import Code, Refused

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, int, int]]
"""Of adapted layers, by name: rows, columns and blocks."""


def store(run_id: str, folds: Mapping[str, Tensor], shapes: Shapes, newest: int, most_bytes: int) -> list[int]:
    """Keep received folds. What the server sends stands: after a resumption, a version may be another.

    Args:
        run_id: The run they belong to.
        folds: ``<version>/<layer>/<part>`` to tensor.
        shapes: Of the layers that a fold may be of.
        newest: The version that the message is of.
        most_bytes: What all runs' folds may take; 0 is half of what would be free without them.

    Returns:
        The versions that are new, or other than they were.

    Raises:
        ValueError: For a run id or a name that cannot be part of a path, or a fold that is not finite, that is not of
            the adapter, or that is of a later version.
        Refused: If there is no room for them.
    """
    by_version: dict[int, dict[str, Tensor]] = {}
    for name, tensor in folds.items():
        version, _, rest = name.partition("/")
        if not (version.isascii() and version.isdigit() and 0 < len(version) < 10 and version[0] != "0"):
            raise ValueError(f"a fold is named {name[:80]!r}; expected <version>/<layer>/<part>")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name[:80]!r} of the received folds is not finite")
        by_version.setdefault(int(version), {})[rest] = tensor
    for number, fold in by_version.items():
        if number > newest:
            raise ValueError(f"a fold of version {number} in a message of version {newest}")
        _require_fit(shapes, fold)
    changed = []
    for number, fold in sorted(by_version.items()):
        data = safetensors.torch.save(fold)
        content, path = _checksum(data) + data, fold_path(run_id, number)
        if path.is_file() and path.read_bytes() == content:
            continue
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_room(path, len(content), most_bytes)
        write_atomically(path, content, mode=0o600)
        changed.append(number)
    return changed


def read(run_id: str, version: int) -> dict[str, Tensor] | None:
    """A fold from the disk; None if it is not there, or was damaged, and then its file is deleted."""
    path = fold_path(run_id, version)
    if not path.is_file():
        return None
    content = path.read_bytes()
    checksum, data = content[:32], content[32:]
    if checksum != _checksum(data):
        log.warning("%s is damaged; it is deleted, and the server is asked for it again", path)
        path.unlink(missing_ok=True)
        return None
    fold: dict[str, Tensor] = safetensors.torch.load(data)
    return fold


def fold_path(run_id: str, version: int) -> Path:
    """Where a run's fold is."""
    return cache_folder() / "folds" / path_part(run_id) / f"{version}.fold"


def _checksum(data: bytes) -> bytes:
    """What stands before a fold's safetensors bytes in its file: their SHA-256 digest."""
    return hashlib.sha256(data).digest()


def _require_fit(shapes: Shapes, fold: Mapping[str, Tensor]) -> None:
    """Refuse a fold that could not be added to the layers' weights, or is larger than these."""
    sizes: dict[str, int] = {}
    for name, tensor in fold.items():
        layer, _, part = name.rpartition("/")
        if layer not in shapes or part not in ("dense", "scaling", *PARTS):
            raise ValueError(f"a fold has the entry {name[:80]!r}, which is of no adapted layer")
        m, n, b = shapes[layer]
        shape = tuple(tensor.shape)
        rank = shape[0 if part == "A" else -1] if shape else 0
        wanted = {"dense": (m, n), "scaling": (), "A": (rank, n), "B": (m, rank), "sigma": (b, b, rank)}[part]
        sizes[layer] = sizes.get(layer, 0) + tensor.nbytes
        if shape != wanted or not tensor.is_floating_point() or sizes[layer] > 4 * m * n + 8:
            raise ValueError(f"the fold's {name[:80]!r} is {shape} {tensor.dtype}, which is no delta of {(m, n)}")


def _make_room(path: Path, size: int, most_bytes: int) -> None:
    """Delete other runs' folds until there is room for a file, the runs first that were longest without a new one."""
    runs: dict[Path, list[int]] = {}
    for file in path.parent.parent.glob("*/*"):
        stat = file.stat()
        held = runs.setdefault(file.parent, [0, 0])
        held[:] = held[0] + stat.st_size, max(held[1], stat.st_mtime_ns)
    used = sum(bytes for bytes, _ in runs.values())
    most_bytes = most_bytes or (shutil.disk_usage(path.parent).free + used) // 2
    used += size
    for run in sorted(runs.keys() - {path.parent}, key=lambda run: runs[run][1]):
        if used <= most_bytes:
            return
        log.info("the base deltas of run %s are deleted, to make room for others", run.name)
        delete(run)
        used -= runs[run][0]
    if used > most_bytes:
        text = f"the run's base deltas would take {used / 1e6:.0f} MB, and have room for {most_bytes / 1e6:.0f} MB"
        raise Refused(Code.FOLDS_TOO_LARGE, text)
