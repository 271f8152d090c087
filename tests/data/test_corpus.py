"""The corpus: which files it holds, and how they are split."""

import os
from pathlib import Path

import pytest

from mc_ds.config import ConfigError
from mc_ds.data.corpus import EXCLUDED_FOLDERS, FilesCorpus, StdlibCorpus, split_of
from tests.support.text_inputs import NOISE, gz, json_lines


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_real_standard_library_without_tests_or_installed_packages() -> None:
    corpus = StdlibCorpus(val_fraction=0.05)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(corpus.files)
    assert corpus.files == sorted(set(corpus.files))
    assert not any(EXCLUDED_FOLDERS & set(name.split("/")) for name in corpus.files)
    assert sum(len(text) for text in corpus.documents("val")) > 50_000
    assert 5e6 < sum(len(text) for text in corpus.documents("train")) < 5e7


def test_every_file_is_in_exactly_one_split() -> None:
    corpus = StdlibCorpus(val_fraction=0.05)
    train, val = corpus.split_files("train"), corpus.split_files("val")
    assert set(train).isdisjoint(val)
    assert sorted(train + val) == corpus.files
    assert 0.02 < len(val) / len(corpus.files) < 0.09


def test_share_of_the_validation_split_and_its_growth_with_the_fraction() -> None:
    names = [f"module_{i}.py" for i in range(4000)]
    small = {name for name in names if split_of(name, 0.1) == "val"}
    large = {name for name in names if split_of(name, 0.3) == "val"}
    assert len(small) / len(names) == pytest.approx(0.1, abs=0.02)
    assert len(large) / len(names) == pytest.approx(0.3, abs=0.03)
    assert small < large


def test_tests_packages_and_empty_files_are_left_out_and_order_is_fixed(tmp_path: Path) -> None:
    keep = {"b.py": "b = 1\n", "a/z.py": "# -*- coding: utf-8 -*-\nz = 'ä'\n", "a.py": "a = 1\n"}
    skip = {
        "test/x.py": "x",
        "a/tests/x.py": "x",
        "idlelib/idle_test/x.py": "x",
        "site-packages/p/x.py": "x",
        "a.txt": "x",
        "empty.py": "",
    }
    write(tmp_path, keep | skip)
    corpus = StdlibCorpus(val_fraction=1e-9, root=tmp_path)
    assert list(corpus.documents("train")) == [keep["a.py"], keep["a/z.py"], keep["b.py"]]


@pytest.mark.parametrize("change", [{"b.py": "b = 2\n"}, {"c.py": "b = 1\n"}])
def test_fingerprint_follows_content_and_names(tmp_path: Path, change: dict[str, str]) -> None:
    write(tmp_path, {"a.py": "a = 1\n", "b.py": "b = 1\n"})
    before = StdlibCorpus(0.1, root=tmp_path).fingerprint()
    assert StdlibCorpus(0.1, root=tmp_path).fingerprint() == before
    assert StdlibCorpus(0.2, root=tmp_path).fingerprint() != before
    write(tmp_path, change)
    assert StdlibCorpus(0.1, root=tmp_path).fingerprint() != before


def test_a_folder_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Python source under .*: install"):
        StdlibCorpus(0.1, root=tmp_path)


def test_files_of_the_user_by_pattern_and_lines_of_jsonl(tmp_path: Path) -> None:
    lines = '{"text": "first"}\n\n{"text": "second", "id": 2}\n{"text": ""}\n'
    write(
        tmp_path,
        {
            "a.txt": "a",
            "deep/b.md": "b",
            "c.log": "c",
            "empty.txt": "",
            "d.jsonl": lines,
            "tests/e.txt": "e",
        },
    )
    corpus = FilesCorpus(1e-9, tmp_path, ["*.txt", "*.md", "*.jsonl"])
    assert list(corpus.documents("train")) == ["a", "first", "second", "b", "e"]
    assert list(corpus.documents("val")) == []
    assert list(FilesCorpus(1e-9, tmp_path, ["deep/*", "tests/*.txt"]).documents("train")) == [
        "b",
        "e",
    ]
    half = FilesCorpus(0.5, tmp_path, ["*.txt", "*.md", "*.jsonl"])
    both = [*half.documents("train"), *half.documents("val")]
    assert sorted(both) == ["a", "b", "e", "first", "second"], "each document in exactly one split"


def test_files_that_cannot_serve_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root = .*contains no file that matches \*\.txt"):
        FilesCorpus(0.1, tmp_path, ["*.txt"])
    write(tmp_path, {"bad.jsonl": '{"text": "fine"}\n{"body": "x"}\n'})
    with pytest.raises(ConfigError, match=r"bad\.jsonl:2: there is no field 'text'"):
        list(FilesCorpus(1e-9, tmp_path, ["*.jsonl"]).documents("train"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"one\ntwo \xff\n", "a.txt:2: byte 0xff is not UTF-8"),
        ("a.txt", b"\x7fELF\0\0", "a.txt is binary"),
        ("a.py", "text".encode("utf-16"), "a.py is UTF-16 text"),
        ("a.c", b"a\n" * 9000 + b"\0", "a.c:9001: has a NUL byte"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "a.jsonl:1: the text has a lone surrogate"),
        ("a.txt.gz", gz(NOISE)[:1500], "a.txt.gz cannot be read completely"),
    ],
)
def test_what_is_not_text_is_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        list(FilesCorpus(1e-9, tmp_path, ["*"]).documents("train"))
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_compressed_files_and_long_ones_are_read_as_text(tmp_path: Path) -> None:
    long = "".join(f"line {number} é\n" for number in range(50_000))
    contents = {
        "a.txt": "\ufeffmark".encode(),
        "b.txt": long.encode(),
        "c.md.gz": gz(b"# title\n"),
        "d.jsonl.gz": gz(json_lines(["first", "second"])),
        "e.jsonl": b"",
        "f.txt": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    corpus = FilesCorpus(1e-9, tmp_path, ["*"])
    assert list(corpus.documents("train")) == ["mark", long, "# title\n", "first", "second"]


def test_lines_are_split_by_their_number(tmp_path: Path) -> None:
    """Whatever segments of a file they are read in."""
    texts = [f"text {number}" for number in range(200)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    corpus = FilesCorpus(0.3, tmp_path, ["*"])
    for split in ("train", "val"):
        wanted = [t for n, t in enumerate(texts) if split_of(f"a.jsonl:{n}", 0.3) == split]
        assert list(corpus.documents(split)) == wanted


def test_pipes_devices_and_broken_links_are_passed_over(tmp_path: Path) -> None:
    """Reading one would wait for a writer, or never end."""
    write(tmp_path, {"text.txt": "words"})
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "text.txt")
    corpus = FilesCorpus(0.0, tmp_path, ["*.txt"])
    assert corpus.files == ["linked.txt", "text.txt"]
    assert list(corpus.documents("train")) == ["words", "words"]


def test_json_nested_too_deep_is_named_by_its_line(tmp_path: Path) -> None:
    write(tmp_path, {"deep.jsonl": '{"text": "a"}\n' + "[" * 100_000})
    with pytest.raises(ConfigError, match=r"deep.jsonl:2: broken JSON"):
        list(FilesCorpus(0.0, tmp_path, ["*.jsonl"]).documents("train"))


def test_names_that_are_not_utf8_are_names(tmp_path: Path) -> None:
    """Linux allows any bytes; the name decides the split and enters the fingerprint."""
    for name in (b"caf\xe9.txt", b"caf\xea.txt", b"plain.txt"):
        (tmp_path / os.fsdecode(name)).write_text(f"words of {len(name)}")
    corpus = FilesCorpus(0.5, tmp_path, ["*.txt"])
    both = [*corpus.documents("train"), *corpus.documents("val")]
    assert sorted(both) == ["words of 8", "words of 8", "words of 9"]
    before = corpus.fingerprint()
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).rename(tmp_path / os.fsdecode(b"caf\xe8.txt"))
    assert FilesCorpus(0.5, tmp_path, ["*.txt"]).fingerprint() != before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "caf\xe9"}', r"a.jsonl:2: byte 0xe9 is not UTF-8"),
        (b'{"text": "a\\ud83d"}', r"a.jsonl:2: the text has a lone surrogate \\ud83d"),
        (b'{"text": null}', r"a.jsonl:2: field 'text' is null, should be a string"),
        (b'{"text": 7}', r"a.jsonl:2: field 'text' is a number, should be a string"),
    ],
)
def test_lines_that_are_no_text_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\\u00e9 \\ud83d\\ude00"}\n' + line + b"\n")
    found = FilesCorpus(1e-9, tmp_path, ["*.jsonl"]).documents("train")
    assert next(found) == "caf\u00e9 \U0001f600"
    with pytest.raises(ConfigError, match=said) as error:
        next(found)
    assert str(error.value).isprintable()
