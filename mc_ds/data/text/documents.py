"""Extracts a document's text from a record, or raises a Fault that names file and line."""

import json
from typing import Any

from mc_ds.data.text.faults import Fault
from mc_ds.data.text.readers import Segment

_MISSING = object()


def document(segment: Segment, number: int, text_field: str) -> bytes | None:
    """Return the text of record `number` of a segment as valid UTF-8; None for a blank line.

    Raises Fault if the record has no text or its text is invalid.
    """
    record = segment.records[number]
    where = place(segment, number)
    if segment.form == "json":
        return _of_json(record or b"", where, text_field)
    if record is None:
        raise Fault("null text", f"{where}: field {text_field!r} is null, should be a string")
    return _checked(record, segment) if segment.form == "text" else _checked_row(record, where)


def place(segment: Segment, number: int) -> str:
    """Return "file:line" of a record, or "file: row N" in Parquet."""
    word = " row " if segment.form == "parquet" else ""
    return f"{segment.name}:{word}{segment.first + number}"


def _of_json(line: bytes, where: str, text_field: str) -> bytes | None:
    if not line.strip():
        return None
    try:
        content = json.loads(line)
    except UnicodeDecodeError as error:
        raise _undecodable(where, error) from None
    except (ValueError, RecursionError) as error:
        raise Fault("broken JSON", f"{where}: broken JSON: {error}") from None
    text = _field(content, text_field)
    if text is _MISSING:
        raise Fault(
            "missing text", f"{where}: there is no field {text_field!r}: choose with --text_field"
        )
    if not isinstance(text, str):
        reason, kind = ("null text", "null") if text is None else ("text not a string", _kind(text))
        raise Fault(reason, f"{where}: field {text_field!r} is {kind}, should be a string")
    if "\0" in text:
        raise Fault("NUL bytes", f"{where}: the text has a NUL character")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Fault(
            "lone surrogates",
            f"{where}: the text has a lone surrogate \\u{ord(text[error.start]):04x}, which is not"
            " valid Unicode",
        ) from None


def _field(content: Any, text_field: str) -> Any:
    """Return the field of that name, or else at that dotted path; `_MISSING` if neither exists."""
    if not isinstance(content, dict):
        return _MISSING
    if text_field in content:
        return content[text_field]
    for part in text_field.split("."):
        if not isinstance(content, dict) or part not in content:
            return _MISSING
        content = content[part]
    return content


def _kind(value: Any) -> str:
    return {bool: "a boolean", int: "a number", float: "a number", list: "a list"}.get(
        type(value), "an object"
    )


def _checked(record: bytes, segment: Segment) -> bytes:
    """Check and return a piece of plain text. Raises Fault if it is not UTF-8 or has a NUL byte."""
    try:
        record.decode()
        bad = record.find(b"\0")
        reason, problem = "NUL bytes", "has a NUL byte"
    except UnicodeDecodeError as error:
        bad = error.start
        reason, problem = "undecodable bytes", f"byte 0x{record[bad]:02x} is not UTF-8"
    if bad < 0:
        return record
    line = segment.first + record.count(b"\n", 0, bad)
    raise Fault(reason, f"{segment.name}:{line}: {problem}")


def _checked_row(record: bytes, where: str) -> bytes:
    try:
        record.decode()
    except UnicodeDecodeError as error:
        raise _undecodable(where, error) from None
    if b"\0" in record:
        raise Fault("NUL bytes", f"{where}: the text has a NUL byte")
    return record


def _undecodable(where: str, error: UnicodeDecodeError) -> Fault:
    byte = error.object[error.start]
    return Fault("undecodable bytes", f"{where}: byte 0x{byte:02x} is not UTF-8")
