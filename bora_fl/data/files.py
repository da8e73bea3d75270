"""Local data: parquet, JSON lines, JSON, CSV and TSV files, folders of them, and folders that `datasets` saved."""

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from bora_fl.config import ConfigError
from bora_fl.data.mapped import csv_options, in_utf8, mapped, read_json, require_columns, simple

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
LARGE = 256 << 20  # bytes of files above which their rows stay on the disk


def looks_local(name: str) -> bool:
    """Whether a data set's name is meant as a path rather than as a hub id."""
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in SUFFIXES or Path(name).exists()


def is_saved(path: Path) -> bool:
    """Whether `datasets` has saved a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def data_files(path: Path) -> list[Path]:
    """The data files that a path stands for, sorted; one file, or all in a folder and below it but for hidden ones.

    Hidden are those that programs keep beside the data, such as Jupyter's copies in ``.ipynb_checkpoints``.
    """
    if path.is_file():
        return [path]
    found = (p for p in path.rglob("*") if p.suffix.lower() in (*SUFFIXES, ".arrow") and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))


def read_local(
    name: str,
    train_split: str,
    test_split: str,
    *,
    may_lack_splits: bool = False,
    texts: Collection[str] = (),
) -> "tuple[Dataset, Dataset | None]":
    """Read the training split and the test split (if it has a name) of a local file or folder.

    In a folder, files called after a split (``train.csv``, ``train-00000-of-00002.parquet``, ``train/0.jsonl``) are
    that split. Otherwise all rows are one table: its column ``split`` tells the splits apart, and without one the table
    is the training split.

    Args:
        name: The path.
        train_split: Name of the training split.
        test_split: Name of the test split; empty for none.
        may_lack_splits: Return data without any splits as the training split alone, whatever `test_split` is.
        texts: Columns of CSV and TSV files that are text, whatever their values look like.

    Raises:
        ConfigError: If there is no such path, file type or split, or a file cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(f"data.name = {name!r}: {path.absolute()} does not exist; give an existing file or folder")
    if is_saved(path):
        return _read_saved(name, path, train_split, test_split, may_lack_splits)
    files = data_files(path)
    if not files or files[0].suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"data.name = {name!r}: no data found; give a file or a folder of files {', '.join(SUFFIXES)}"
        )
    train_files = [p for p in files if path.is_dir() and _belongs(p.relative_to(path), train_split)]
    if train_files:
        test_files = [p for p in files if test_split and _belongs(p.relative_to(path), test_split)]
        if test_split and not test_files:
            raise _no_split("test", test_split, f"the folder holds {', '.join(p.name for p in files[:8])}")
        test = _dataset(read_tables(test_files, texts), f"{path}:{test_split}") if test_files else None
        return _dataset(read_tables(train_files, texts), f"{path}:{train_split}"), test
    whole = _dataset(read_tables(files, texts), str(path))
    if "split" not in whole.column_names:
        if test_split and not may_lack_splits:
            raise _no_split("test", test_split, f"{path.name} has no column named split")
        return whole, None
    return _rows(whole, "train", train_split), _rows(whole, "test", test_split) if test_split else None


def _belongs(path: Path, split: str) -> bool:
    stem = path.name.split(".")[0]
    return split in path.parts[:-1] or stem == split or stem.startswith((f"{split}-", f"{split}_"))


def _no_split(which: str, split: str, found: str) -> ConfigError:
    remedy = (
        "or leave it empty for no central test set"
        if which == "test"
        else "or give a file without a column named split"
    )
    return ConfigError(f"data.{which}-split = {split!r}: {found}; name a split that is there, {remedy}")


def _rows(data: "Dataset", which: str, split: str) -> "Dataset":
    import numpy as np
    import pyarrow.compute as pc

    names = data.data.column("split").cast(pa.string())
    if names.null_count and which == "train":
        log.warning("%d of %d rows have no split and are left out", names.null_count, len(names))
    rows = np.flatnonzero(pc.fill_null(pc.equal(names, split), False).to_numpy())
    if len(rows) == 0:
        known = pc.unique(names.drop_null()).to_pylist()
        raise _no_split(which, split, f"the column named split holds {', '.join(sorted(known))}")
    return data.select(rows)


def _read_saved(
    name: str, path: Path, train_split: str, test_split: str, may_lack_splits: bool
) -> "tuple[Dataset, Dataset | None]":
    """Read what `datasets.Dataset.save_to_disk` wrote; it stays on the disk, mapped into memory."""
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(str(path))
    if isinstance(saved, Dataset):
        if test_split and not may_lack_splits:
            raise _no_split("test", test_split, f"{name} is one split")
        return saved, None
    for which, split in (("train", train_split), ("test", test_split)):
        if split and split not in saved:
            raise _no_split(which, split, f"{name} holds {', '.join(saved)}")
    return saved[train_split], saved[test_split] if test_split else None


def read_table(path: Path, texts: Collection[str] = ()) -> pa.Table:
    """The rows of one file, by its suffix; `texts` as in `read_local`.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return simple(_read_one(path, texts))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"data.name: {path} cannot be read as {path.suffix[1:]} ({error}); check the file") from error


def read_tables(files: Sequence[Path], texts: Collection[str] = ()) -> pa.Table:
    """The rows of several files; on the disk, as `mapped` has them, if they are large. `texts` as in `read_local`.

    Raises:
        ConfigError: If one cannot be read, or they do not have the same columns.
    """
    try:
        if sum(file.stat().st_size for file in files) > LARGE and not any(map(_is_array, files)):
            return mapped(files, texts)
        return pa.concat_tables([read_table(file, texts) for file in files], promote_options="permissive")
    except pa.ArrowException as error:
        raise ConfigError(
            f"data.name: the files of {files[0].parent} cannot be read, or do not have the same columns ({error})"
        ) from error


def _read_one(path: Path, texts: Collection[str]) -> pa.Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path)
    if suffix in (".csv", ".tsv"):
        from pyarrow import csv

        table = csv.read_csv(path, **csv_options(suffix, dict.fromkeys(texts, pa.string())))
        require_columns(table.schema)
        return in_utf8(table)
    if _is_array(path):
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        if odd := [row for row in rows if not isinstance(row, dict)]:
            raise ValueError(f"it is a list with {str(odd[0])[:40]!r} in the place of a row, which is an object")
        names = dict.fromkeys(name for row in rows for name in row)  # pyarrow would take those of the first row alone
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    return read_json(path)


def _is_array(path: Path) -> bool:
    """Whether a file is one JSON array, which cannot be read in pieces."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _dataset(table: pa.Table, name: str) -> "Dataset":
    """The table as a data set; its fingerprint is no digest of the rows, which would read them all."""
    from datasets import Dataset

    return Dataset(table, fingerprint=hashlib.sha256(name.encode()).hexdigest()[:16])
