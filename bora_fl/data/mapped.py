"""Local data that is larger than memory: converted once, piece by piece, into Arrow files that stay on the disk."""

import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from bora_fl.config import ConfigError
from bora_fl.paths import atomically, cache_folder, delete

log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20  # of a file in memory at a time; a JSON line or CSV cell may be this long
_ROWS = 2048  # of a parquet file in memory at a time
_ODD_COLUMN = re.compile(r"CSV column #(\d+).* conversion error")
_WIDER = {pa.null(): pa.int64(), pa.int64(): pa.float64()}


def mapped(paths: Sequence[Path], texts: Collection[str] = ()) -> pa.Table:
    """The rows of data files as one table whose columns lie on the disk.

    The Arrow files are in the cache folder, readable by their owner alone, and as large as the data without
    compression. They are made again when a file changes.

    Args:
        paths: The files.
        texts: Columns of CSV and TSV files that are text, whatever their values look like.

    Raises:
        pa.ArrowException: If a file cannot be read.
        ConfigError: If the cache folder cannot be written.
    """
    known = hashlib.sha256("\n".join(str(path.absolute()) for path in paths).encode()).hexdigest()[:16]
    stats = [path.stat() for path in paths]
    state = hashlib.sha256(repr([(s.st_size, s.st_mtime_ns) for s in stats] + sorted(texts)).encode()).hexdigest()[:16]
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
                    for number, table in enumerate(piece for path in paths for piece in _pieces(path, texts)):
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


def _pieces(path: Path, texts: Collection[str]) -> Iterator[pa.Table]:
    """A file's rows, few at a time."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            yield from (simple(pa.Table.from_batches([batch])) for batch in file.iter_batches(_ROWS))
    elif suffix in (".csv", ".tsv"):
        yield from _csv_pieces(path, _csv_types(path, texts))
    else:
        with path.open("rb") as file:
            while lines := file.read(PIECE_BYTES):
                lines += file.readline()
                if lines.strip():
                    yield simple(read_json(pa.BufferReader(lines), len(lines)))


def _csv_pieces(path: Path, types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
    from pyarrow import csv

    with csv.open_csv(path, **csv_options(path.suffix.lower(), types)) as reader:
        require_columns(reader.schema)
        yield from (simple(in_utf8(pa.Table.from_batches([batch]))) for batch in reader)


def _csv_types(path: Path, texts: Collection[str]) -> dict[str, pa.DataType]:
    """The types of columns whose first piece looks like another type than the whole file has.

    pyarrow takes the types from the first piece; a column that does not go on like that is read again as the next type
    that it would have taken.
    """
    types: dict[str, pa.DataType] = dict.fromkeys(texts, pa.string())
    while True:
        schema = None
        try:
            for piece in _csv_pieces(path, types):
                schema = piece.schema
            return types
        except pa.ArrowInvalid as error:
            odd = _ODD_COLUMN.search(str(error))
            if schema is None or odd is None or schema.types[int(odd[1])] == pa.string():
                raise
            column = schema.field(int(odd[1]))
            types[column.name] = _WIDER.get(column.type, pa.string())


def read_json(source: "Path | pa.BufferReader", size: int = 0) -> pa.Table:
    """JSON objects, one after the other; none may be longer than `size` bytes, `PIECE_BYTES` by default."""
    from pyarrow import json

    options = json.ReadOptions(block_size=size or PIECE_BYTES)
    table = json.read_json(source, read_options=options)
    texts = pa.schema([field.with_type(_as_written(field.type)) for field in table.schema])
    if texts != table.schema:  # what looks like a date is text in JSON, and is kept as it is written
        if isinstance(source, pa.BufferReader):
            source.seek(0)
        parse = json.ParseOptions(explicit_schema=texts)
        table = json.read_json(source, read_options=options, parse_options=parse)
    return in_utf8(table)


def _as_written(kind: pa.DataType) -> pa.DataType:
    """A type in which dates are strings."""
    if pa.types.is_struct(kind):
        return pa.struct([part.with_type(_as_written(part.type)) for part in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_written(kind.value_type)))
    return pa.string() if pa.types.is_temporal(kind) else kind


def in_utf8(table: pa.Table) -> pa.Table:
    """The table of a text file.

    Raises:
        pa.ArrowException: If the file has another encoding.
    """
    for name in table.column_names:
        try:
            table[name].validate(full=True)
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(
                f"column {name} is not UTF-8; convert the file, as with iconv -f latin1 -t utf8"
            ) from error
    return table


def require_columns(schema: pa.Schema) -> None:
    """Refuse a CSV file whose columns cannot be told apart.

    Raises:
        pa.ArrowInvalid: If two have one name, or something else than commas is between them.
    """
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise pa.ArrowInvalid(f"it has several columns named {name!r}; rename them")
    (only, *others) = schema.names
    if not others and (mark := next((mark for mark in ";\t|" if mark in only), "")):
        raise pa.ArrowInvalid(f"its columns are separated by {mark!r}; write commas, or tabs in a .tsv file")


def csv_options(suffix: str, types: Mapping[str, pa.DataType]) -> dict[str, Any]:
    """How a CSV or TSV file is read, its columns in the types that are known."""
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
    convert = csv.ConvertOptions(column_types=dict(types), check_utf8=False)  # `in_utf8` names the column
    return {
        "read_options": csv.ReadOptions(block_size=PIECE_BYTES),
        "parse_options": parse,
        "convert_options": convert,
    }


def simple(table: pa.Table) -> pa.Table:
    """The same values without encodings that few functions take."""
    fields = [field.with_type(_simple(field.type)) for field in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _simple(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.large_string() if pa.types.is_string_view(kind) else kind
