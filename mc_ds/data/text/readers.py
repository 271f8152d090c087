"""Splits input files into records: pieces of plain text, lines of JSON, rows of Parquet.

Records are not decoded here, so that one reading process can feed many workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, Any

from mc_ds.data.text.cutting import WINDOW, pieces_of
from mc_ds.data.text.faults import Fault
from mc_ds.data.text.opening import need_pyarrow, opened, seekable
from mc_ds.data.text.plan import Form, InputFile

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
SNIFFED_BYTES = 8192
"""Bytes at the start of a file that are searched for NUL, the sign of a binary file."""
LINES_BYTES = 1 << 20
"""Minimum bytes of lines in a segment."""
ROWS = 64
"""Parquet rows read at once."""
ROWS_BUFFER = 1 << 20
"""Bytes of a Parquet column read at a time. Without a buffer pyarrow reads a whole row group into
memory, which may be the whole file.
"""


@dataclass(frozen=True)
class Segment:
    """Consecutive records of one file."""

    source: int
    """Index of the file."""
    name: str
    form: Form
    first: int
    """Line or row of the first record, counted from 1."""
    records: list[bytes | None]
    continues: bool
    """The first record is another piece of the document of the record before it."""
    position: int
    """Bytes of the stored file read up to the end of this segment."""


@dataclass(frozen=True)
class TooLarge:
    """A record that is skipped because it exceeds the size limit."""

    where: str


def segments(
    source: int, file: InputFile, *, text_field: str, max_bytes: int
) -> Iterator[Segment | TooLarge]:
    """Yield a file's records in order. Raises Fault if it cannot be read completely; then discard
    what was yielded before.
    """
    with opened(file) as (content, raw):
        match file.form:
            case "text":
                yield from _text(source, file.name, content, raw)
            case "json":
                yield from _lines(source, file.name, content, raw, max_bytes)
            case "parquet" if file.compression:
                with seekable(content) as copy:
                    yield from _rows(source, file.name, copy, copy, text_field, max_bytes)
            case "parquet":
                yield from _rows(source, file.name, raw, raw, text_field, max_bytes)


def _skip_mark(name: str, content: BufferedReader) -> bytes:
    """Skip a UTF-8 byte order mark, and peek at the bytes after it without consuming them. Raises
    Fault for a UTF-16 mark.
    """
    head = content.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]
    if head.startswith(UTF16):
        raise Fault("UTF-16 file", f"{name} is UTF-16 text: convert it to UTF-8")
    if head.startswith(BOM):
        content.read(len(BOM))
    return head.removeprefix(BOM)


def _text(source: int, name: str, content: BufferedReader, raw: IO[bytes]) -> Iterator[Segment]:
    if b"\0" in _skip_mark(name, content):
        raise Fault("binary", f"{name} is binary: there is a NUL byte near its start")
    line = 1
    for number, piece in enumerate(pieces_of(content)):
        yield Segment(source, name, "text", line, [piece], number > 0, raw.tell())
        line += piece.count(b"\n")


def _lines(
    source: int, name: str, content: BufferedReader, raw: IO[bytes], max_bytes: int
) -> Iterator[Segment | TooLarge]:
    if not _skip_mark(name, content):
        raise Fault("empty", f"{name} is empty")
    records: list[bytes | None] = []
    first, size = 1, 0
    for number, line in enumerate(_lines_of(content, max_bytes), start=1):
        if line is None:
            yield TooLarge(f"{name}:{number}")
        records.append(line or b"")
        size += len(records[-1] or b"")
        if size >= LINES_BYTES:
            yield Segment(source, name, "json", first, records, False, raw.tell())
            first, records, size = number + 1, [], 0
    if records:
        yield Segment(source, name, "json", first, records, False, raw.tell())


def _lines_of(content: IO[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines, and None for one longer than `max_bytes`, which is skipped in small
    parts.
    """
    while line := content.readline(max_bytes + 1):
        if line.endswith(b"\n") or len(line) <= max_bytes:
            yield line
            continue
        while not line.endswith(b"\n") and (line := content.readline(WINDOW)):
            pass
        yield None


def _rows(
    source: int, name: str, file: IO[bytes], raw: IO[bytes], text_field: str, max_bytes: int
) -> Iterator[Segment | TooLarge]:
    need_pyarrow(f"reading {name}")
    import pyarrow as pa
    from pyarrow import parquet

    first = 1
    try:
        with parquet.ParquetFile(file, buffer_size=ROWS_BUFFER, pre_buffer=False) as table:
            column, path = _column(name, table.schema_arrow, text_field)
            batches = table.iter_batches(ROWS, columns=[column], use_threads=False)
            for batch in batches:
                records = _as_bytes(batch.column(0), path).to_pylist()
                for row, record in enumerate(records):
                    if record is not None and len(record) > max_bytes:
                        yield TooLarge(f"{name}: row {first + row}")
                        records[row] = b""
                yield Segment(source, name, "parquet", first, records, False, raw.tell())
                first += len(records)
    except pa.ArrowException as error:
        raise Fault(
            "unreadable file", f"{name} cannot be read as Parquet: {str(error).splitlines()[0]}"
        ) from None


def _column(name: str, schema: Any, text_field: str) -> tuple[str, list[str]]:
    """Return the column that contains `text_field`, and the field's path within that column."""
    import pyarrow as pa

    parts = text_field.split(".")
    column, path = (text_field, []) if text_field in schema.names else (parts[0], parts[1:])
    if column not in schema.names:
        raise Fault(
            "file without the field",
            f"{name} has no column {column!r}: its columns are {', '.join(schema.names)};"
            " choose with --text_field",
        )
    kind = schema.field(column).type
    for part in path:
        index = kind.get_field_index(part) if pa.types.is_struct(kind) else -1
        if index < 0:
            raise Fault(
                "file without the field",
                f"{name} has no field {text_field!r}: choose with --text_field",
            )
        kind = kind.field(index).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise Fault(
            "file without the field",
            f"{name}: {text_field!r} is of type {kind}, should be string: choose with --text_field",
        )
    return column, path


def _as_bytes(column: Any, path: list[str]) -> Any:
    """Return a column's strings as bytes, not checked to be UTF-8."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.struct_field(column, path) if path else column
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.large_string()).cast(pa.large_binary())


def in_blocks(found: Iterator[Segment], block_bytes: int) -> Iterator[list[Segment]]:
    """Group consecutive segments into blocks of at least `block_bytes` (deterministic)."""
    block: list[Segment] = []
    size = 0
    for segment in found:
        block.append(segment)
        size += sum(len(record or b"") for record in segment.records)
        if size >= block_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block
