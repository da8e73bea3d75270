"""Local data that is larger than memory: converted once, piece by piece, into Arrow files that stay on the disk."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from bora_fl.config import ConfigError
from bora_fl.paths import atomically, cache_folder, delete

log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20  # of a file in memory at a time; a JSON line or CSV cell may be this long
_ROWS = 2048  # of a parquet file in memory at a time


def mapped(paths: Sequence[Path]) -> pa.Table:
    """The rows of data files as one table whose columns lie on the disk.

    The Arrow files are in the cache folder, readable by their owner alone, and as large as the data without
    compression. They are made again when a file changes.

    Raises:
        pa.ArrowException: If a file cannot be read.
        ConfigError: If the cache folder cannot be written.
    """
    known = hashlib.sha256("\n".join(str(path.absolute()) for path in paths).encode()).hexdigest()[:16]
    stats = [path.stat() for path in paths]
    state = hashlib.sha256(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode()).hexdigest()[:16]
    folder = cache_folder() / "tables" / f"{known}-{state}"
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{known}.lock"):  # one process converts, others wait
            if not folder.is_dir():
                for stale in folder.parent.glob(f"{known}-*"):
                    delete(stale)
                log.info("converting %s for reading from the disk (once)", ", ".join(path.name for path in paths[:8]))
                with atomically(folder) as part:
                    part.mkdir(mode=0o700)
                    for number, table in enumerate(piece for path in paths for piece in _pieces(path)):
                        target = str(part / f"{number:08}.arrow")
                        with pa.OSFile(target, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                            writer.write_table(table, max_chunksize=_ROWS)
    except OSError as error:
        raise ConfigError(
            f"data.name: {paths[0]} is large, and cannot be converted in {folder.parent} ({error}); make room there, "
            "or set BORA_FL_CACHE to a folder on another disk"
        ) from error
    files = sorted(folder.glob("*.arrow"))
    return pa.concat_tables(
        [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files], promote_options="permissive"
    )


def _pieces(path: Path) -> Iterator[pa.Table]:
    """A file's rows, few at a time."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            yield from (simple(pa.Table.from_batches([batch])) for batch in file.iter_batches(_ROWS))
    elif suffix in (".csv", ".tsv"):
        from pyarrow import csv

        with csv.open_csv(path, **csv_options(suffix)) as reader:
            yield from (simple(in_utf8(pa.Table.from_batches([batch]))) for batch in reader)
    else:
        with path.open("rb") as file:
            while lines := file.read(PIECE_BYTES):
                lines += file.readline()
                if lines.strip():
                    yield simple(read_json(pa.BufferReader(lines), len(lines)))


def read_json(source: "Path | pa.BufferReader", size: int = 0) -> pa.Table:
    """JSON objects, one after the other; none may be longer than `size` bytes, `PIECE_BYTES` by default."""
    from pyarrow import json

    return in_utf8(json.read_json(source, read_options=json.ReadOptions(block_size=size or PIECE_BYTES)))


def in_utf8(table: pa.Table) -> pa.Table:
    """The table of a text file.

    Raises:
        pa.ArrowException: If the file has another encoding, of which pyarrow makes columns of bytes, or text as it is.
    """
    for field in table.schema:
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            raise pa.ArrowInvalid(
                f"column {field.name} is not UTF-8; convert the file, as with iconv -f latin1 -t utf8"
            )
    table.validate(full=True)
    return table


def csv_options(suffix: str) -> dict[str, Any]:
    """How a CSV or TSV file is read."""
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
    return {"read_options": csv.ReadOptions(block_size=PIECE_BYTES), "parse_options": parse}


def simple(table: pa.Table) -> pa.Table:
    """The same values without encodings that few functions take."""
    fields = [field.with_type(_simple(field.type)) for field in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _simple(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.large_string() if pa.types.is_string_view(kind) else kind
