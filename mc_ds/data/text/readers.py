"""Input files as records: pieces of plain text, lines of JSON, rows of Parquet. Nothing is
decoded here, so that one process can feed many.
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
"""Start of a file that is searched for NUL, which no text has."""
LINES_BYTES = 1 << 20
"""Lines of at least so many bytes make a segment."""
ROWS = 64
"""Rows of Parquet that are read at once."""
ROWS_BUFFER = 1 << 20
"""Bytes of a Parquet column in memory: without a buffer the library reads a whole row group, which
may be the whole file.
"""


@dataclass(frozen=True)
class Segment:
    """Records of one file that follow one another."""

    source: int
    """Number of the file."""
    name: str
    form: Form
    first: int
    """Line or row of the first record, counted from 1."""
    records: list[bytes | None]
    continues: bool
    """Whether the first record is a further piece of the document before it."""
    position: int
    """Bytes of the file, as stored, that have been read by its end."""


@dataclass(frozen=True)
class TooLarge:
    """A record above the limit, left out."""

    where: str


def segments(
    source: int, file: InputFile, *, text_field: str, max_bytes: int
) -> Iterator[Segment | TooLarge]:
    """Read a file to its end. Raises Fault where that cannot be done; what was yielded before is
    not whole then.
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
    """Read past the mark of UTF-8; return some bytes that follow, to be read again. Raises Fault
    for the mark of UTF-16.
    """
    head = content.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]
    if head.startswith(UTF16):
        raise Fault("UTF-16 file", f"{name} is UTF-16 text: convert it to UTF-8")
    if head.startswith(BOM):
        content.read(len(BOM))
    return head.removeprefix(BOM)


def _text(source: int, name: str, content: BufferedReader, raw: IO[bytes]) -> Iterator[Segment]:
    if b"\0" in _skip_mark(name, content):
        raise Fault("binary", f"{name} is binary: it has a NUL byte near its start")
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
    """Yield the lines; None for one above `max_bytes`, which is read past in small parts."""
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
            "unreadable file", f"{name} is no readable Parquet: {str(error).splitlines()[0]}"
        ) from None


def _column(name: str, schema: Any, text_field: str) -> tuple[str, list[str]]:
    """Return the column that holds the field, and the path of the field inside it."""
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
            raise Fault("file without the field", f"{name} has no field {text_field!r}")
        kind = kind.field(index).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise Fault("file without the field", f"{name}: {text_field!r} holds {kind}, not strings")
    return column, path


def _as_bytes(column: Any, path: list[str]) -> Any:
    """Return the strings of a column as bytes, which may or may not be UTF-8."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.struct_field(column, path) if path else column
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.large_string()).cast(pa.large_binary())


def in_blocks(found: Iterator[Segment], block_bytes: int) -> Iterator[list[Segment]]:
    """Join segments until they have at least `block_bytes`; the same segments, the same
    blocks.
    """
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
