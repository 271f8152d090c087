"""Files of every form to records, and what cannot be read to its end."""

import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mc_ds.config import ConfigError
from mc_ds.data.text.documents import document
from mc_ds.data.text.faults import Fault
from mc_ds.data.text.plan import make_plan
from mc_ds.data.text.readers import Segment, TooLarge, segments
from tests.support.optional import optional
from tests.support.text_inputs import NOISE, gz, json_lines, parquet, some_texts, zst

TEXTS = some_texts(200)


def read(path: Path, field: str = "text", max_bytes: int = 10**6) -> list[str | None]:
    """The text of every record; None where one was too large."""
    (file,) = make_plan([str(path)]).files
    found: list[str | None] = []
    for segment in segments(0, file, text_field=field, max_bytes=max_bytes):
        if isinstance(segment, TooLarge):
            found.append(None)
            continue
        contents = [document(segment, i, field) for i in range(len(segment.records))]
        found += [content.decode() for content in contents if content]
    return found


def lay(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gz), (".zst", zst), (".GZ", gz)])
def test_every_form_gives_the_same_texts_compressed_or_not(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    lines = lay(tmp_path, f"a.jsonl{suffix}", pack(json_lines(TEXTS, "content")))
    assert read(lines, "content") == TEXTS
    rows = lay(tmp_path, f"a.parquet{suffix}", pack(parquet(TEXTS, "content")))
    assert read(rows, "content") == TEXTS
    whole = "".join(TEXTS)
    assert read(lay(tmp_path, f"a.txt{suffix}", pack(whole.encode()))) == [whole]


def test_files_of_several_compressed_streams_are_read_to_the_end(tmp_path: Path) -> None:
    halves = [json_lines(TEXTS[:3]), json_lines(TEXTS[3:9])]
    assert read(lay(tmp_path, "a.jsonl.gz", b"".join(map(gz, halves)))) == TEXTS[:9]
    assert read(lay(tmp_path, "a.jsonl.zst", b"".join(map(zst, halves)))) == TEXTS[:9]


def test_nested_fields_are_named_with_dots_and_names_with_dots_come_first(tmp_path: Path) -> None:
    path = lay(tmp_path, "a.jsonl", b'{"a": {"b": "inner"}}\n\n{"a.b": "outer", "a": 1}')
    assert read(path, "a.b") == ["inner", "outer"]
    rows = lay(tmp_path, "a.parquet", parquet([{"b": "x"}, {"b": "y"}], "a"))
    assert read(rows, "a.b") == ["x", "y"]


def test_the_mark_of_utf8_is_dropped(tmp_path: Path) -> None:
    assert read(lay(tmp_path, "a.txt", b"\xef\xbb\xbfa")) == ["a"]
    assert read(lay(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + json_lines(["a"]))) == ["a"]


HALF = slice(None, 1500)
UNDECODABLE_ROWS = parquet(["a", "WXYZ"]).replace(b"WXYZ", b"WX\xffZ")
UTF16_LINES = '{"text": "a"}\n{"text": "b"}\n'.encode("utf-16-le")


@pytest.mark.parametrize(
    ("name", "content", "reason", "message"),
    [
        ("a.txt", "text".encode("utf-16"), "UTF-16 file", "a.txt is UTF-16 text: convert"),
        ("a.jsonl", b"\xfe\xff\0{", "UTF-16 file", "a.jsonl is UTF-16"),
        ("a.txt", b"\x7fELF\x02\0\0", "binary", "a.txt is binary: there is a NUL byte"),
        ("a.jsonl.gz", gz(NOISE)[HALF], "unreadable file", "Compressed file ended"),
        ("a.jsonl.gz", b"no gzip at all", "unreadable file", "Not a gzipped file"),
        ("a.jsonl.zst", zst(NOISE)[HALF], "unreadable file", "Truncated compressed"),
        ("a.txt.zst", b"no zstd", "unreadable file", "a.txt.zst cannot be read completely"),
        (
            "a.parquet",
            parquet(TEXTS)[HALF],
            "unreadable file",
            "a.parquet cannot be read as Parquet",
        ),
        ("a.parquet", b"", "unreadable file", "a.parquet cannot be read as Parquet"),
        ("a.parquet", parquet(["x"], "b"), "file without the field", "its columns are id, b; ch"),
        (
            "a.parquet",
            parquet([7]),
            "file without the field",
            "'text' is of type int64, should be string",
        ),
        ("a.parquet", parquet([None, "x"]), "null text", "a.parquet: row 1: field 'text' is null"),
        ("a.parquet", parquet(["x", "\0"]), "NUL bytes", "a.parquet: row 2: the text has a NUL"),
        ("a.parquet", UNDECODABLE_ROWS, "undecodable bytes", "a.parquet: row 2: byte 0xff is not"),
        ("a.txt", "text".encode("utf-16-le"), "binary", "a.txt is binary: there is a NUL byte"),
        ("a.jsonl", UTF16_LINES, "undecodable bytes", "a.jsonl:1: byte 0x0a is not UTF-8"),
        ("a.txt", b"one\ntwo \xff\n", "undecodable bytes", "a.txt:2: byte 0xff is not UTF-8"),
        ("a.txt", b"a\n" * 9000 + b"\0", "NUL bytes", "a.txt:9001: has a NUL byte"),
        ("a.jsonl", json_lines(["x"]) + b'{"text": ', "broken JSON", "a.jsonl:2: broken JSON"),
        ("a.jsonl", b"[" * 99_999, "broken JSON", "a.jsonl:1: broken JSON"),
        ("a.jsonl", b'"text"\n', "missing text", "a.jsonl:1: there is no field 'text'"),
        (
            "a.jsonl",
            b'{"body": "x"}\n',
            "missing text",
            "a.jsonl:1: there is no field 'text': choose",
        ),
        ("a.jsonl", b'\n{"text": null}\n', "null text", "a.jsonl:2: field 'text' is null, should"),
        ("a.jsonl", b'{"text": 7}\n', "text not a string", "a.jsonl:1: field 'text' is a number"),
        ("a.jsonl", b'{"text": {}}\n', "text not a string", "a.jsonl:1: field 'text' is an object"),
        ("a.jsonl", b'{"text": "\\u0000"}', "NUL bytes", "a.jsonl:1: the text has a NUL"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "lone surrogates", r"a.jsonl:1: .*surrogate \\ud800"),
        ("a.jsonl", b'{"text": "\xff"}', "undecodable bytes", "a.jsonl:1: byte 0xff is not UTF-8"),
    ],
)
def test_bad_input_is_a_fault_that_names_file_and_line(
    tmp_path: Path, name: str, content: bytes, reason: str, message: str
) -> None:
    with pytest.raises(Fault, match=message) as raised:
        read(lay(tmp_path, name, content))
    assert raised.value.reason == reason
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_line_of_a_gigabyte_is_read_past_in_little_memory(tmp_path: Path) -> None:
    path = lay(tmp_path, "a.jsonl", json_lines(["before"]))
    with path.open("ab") as file:
        file.truncate(1 << 30)  # sparse
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json_lines(["after"]))
    tracemalloc.start()
    assert read(path, max_bytes=10**6) == [None, "before", "after"]
    assert tracemalloc.get_traced_memory()[1] < 20 * 10**6
    tracemalloc.stop()


def test_rows_above_the_limit_are_left_out(tmp_path: Path) -> None:
    path = lay(tmp_path, "a.parquet", parquet(["a", "b" * 2000, "c"]))
    assert read(path, max_bytes=1000) == [None, "a", "c"]


def test_a_row_group_of_any_size_is_read_in_little_memory(tmp_path: Path) -> None:
    pyarrow, pq = optional("pyarrow"), optional("pyarrow.parquet")
    rows = pyarrow.table({"text": [f"{i} " + 290 * chr(65 + i % 26) for i in range(100_000)]})
    path = tmp_path / "a.parquet"
    pq.write_table(rows, path, compression="none", use_dictionary=False)
    assert pq.ParquetFile(path).num_row_groups == 1
    del rows
    before = pyarrow.total_allocated_bytes()
    (file,) = make_plan([str(path)]).files
    count = most = 0
    tracemalloc.start()
    for found in segments(0, file, text_field="text", max_bytes=10**6):
        assert isinstance(found, Segment)
        count += len(found.records)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert count == 100_000
    assert most + tracemalloc.get_traced_memory()[1] < 10 * 10**6, "of 30 MB"
    tracemalloc.stop()


def test_a_full_disk_is_no_fault_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `--on_error skip` would leave the file out."""
    path = lay(tmp_path, "a.parquet.gz", gz(parquet(TEXTS)))
    assert read(path) == TEXTS
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: (tmp_path / "full").open("r+b", 0))
    with pytest.raises(OSError, match="No space left on device"):
        read(path)


def test_lines_at_the_limit_are_whole(tmp_path: Path) -> None:
    path = lay(tmp_path, "a.jsonl", b'{"text":"ab"}\n{"text":"abc"}\n{"text":"ab"}')
    assert read(path, max_bytes=13) == [None, "ab", "ab"]


def test_a_file_that_grows_while_it_is_read_is_a_fault(tmp_path: Path) -> None:
    path = lay(tmp_path, "a.jsonl", json_lines(TEXTS))
    (file,) = make_plan([str(path)]).files
    found = segments(0, file, text_field="text", max_bytes=10**6)
    assert isinstance(next(found), Segment)
    with path.open("ab") as writer:
        writer.write(json_lines(["more"]))
    with pytest.raises(
        Fault, match=r"a.jsonl changed while it was being read: try again when nothing"
    ):
        list(found)


def test_a_file_that_vanishes_or_becomes_a_pipe_is_a_fault(tmp_path: Path) -> None:
    path = lay(tmp_path, "a.txt", b"text")
    (file,) = make_plan([str(path)]).files
    path.unlink()
    with pytest.raises(Fault, match=r"a.txt cannot be read completely: No such file"):
        list(segments(0, file, text_field="text", max_bytes=10**6))
    os.mkfifo(path)
    with pytest.raises(Fault, match=r"a.txt cannot be read completely: not a regular file"):
        list(segments(0, file, text_field="text", max_bytes=10**6))


def test_a_missing_package_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lay(tmp_path, "a.jsonl.zst", zst(b"{}"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"a.jsonl.zst needs the package pyarrow: pip install"):
        read(path)
