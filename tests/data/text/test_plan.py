"""The one rule for what is read."""

import os
from pathlib import Path

import pytest

from mc_ds.config import ConfigError
from mc_ds.data.text.plan import form_of, make_plan


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("text", "")),
        ("A.TXT.GZ", ("text", ".gz")),
        ("b.MD", ("text", "")),
        ("c.rst.zst", ("text", ".zst")),
        ("d.py", ("text", "")),
        ("e.jsonl", ("json", "")),
        ("e.NdJson.gz", ("json", ".gz")),
        ("f.parquet.zst", ("parquet", ".zst")),
        ("g.gz", None),
        ("txt", None),
        ("h.csv", None),
    ],
)
def test_the_suffix_decides(name: str, expected: tuple[str, str] | None) -> None:
    assert form_of(name) == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    for name in ("b.txt", "a/c.md", "a/d.jsonl.gz", ".hidden.txt", ".git/e.txt", "f.csv"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def names(folder: Path, *inputs: str) -> list[str]:
    return [os.path.relpath(file.path, folder) for file in make_plan(inputs).files]


def test_a_folder_is_read_in_the_order_of_names_without_hidden_and_unknown_ones(
    folder: Path,
) -> None:
    plan = make_plan([str(folder)])
    assert names(folder, str(folder)) == ["a/c.md", "a/d.jsonl.gz", "b.txt"]
    assert plan.skipped == {"hidden": 2, "unknown suffix": 1}
    assert plan.sources[0].model_dump() == {"name": str(folder), "files": 3, "bytes": plan.size}


def test_links_are_followed_and_every_real_file_is_read_once(folder: Path) -> None:
    (folder / "z.txt").symlink_to(folder / "b.txt")
    (folder / "a" / "circle").symlink_to(folder)
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "o.txt").write_text("o")
    (folder / "link").symlink_to(outside)
    os.link(folder / "b.txt", folder / "y.txt")
    plan = make_plan([str(folder), str(folder / "b.txt")])
    assert [os.path.relpath(file.path, folder) for file in plan.files] == [
        "a/c.md",
        "a/d.jsonl.gz",
        "b.txt",
        "link/o.txt",
    ]
    assert plan.skipped["repeated file"] == 3
    assert plan.skipped["repeated folder"] == 1
    assert plan.skipped["broken link"] == 1


def test_inputs_are_files_folders_and_patterns(folder: Path) -> None:
    assert names(folder, str(folder / "b.txt"), str(folder / "a")) == [
        "b.txt",
        "a/c.md",
        "a/d.jsonl.gz",
    ]
    assert names(folder, str(folder / "**" / "*.md")) == ["a/c.md"]
    odd = folder / "odd[1].txt"
    odd.write_text("a file whose name is a pattern")
    assert names(folder, str(odd)) == ["odd[1].txt"]


def test_a_pipe_in_a_folder_is_skipped(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    assert make_plan([str(folder)]).skipped["not a regular file"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", r"nowhere cannot be read: No such file or directory: give a file"),
        ("no*.txt", r"no\*.txt matches no file: give another pattern"),
        ("f.csv", r"f.csv has an unknown suffix: should be one of .txt .md .rst .py .jsonl"),
        ("pipe.txt", r"pipe.txt is a pipe or a device: give a file, or give - and pipe"),
        (".git", None),
        ("empty", r"nothing to read \(skipped: nothing\): give files that end in .txt"),
    ],
)
def test_inputs_that_cannot_be_read_are_told_in_one_line(
    folder: Path, given: str, message: str | None
) -> None:
    os.mkfifo(folder / "pipe.txt")
    (folder / "empty").mkdir()
    if message is None:  # what is named is read, hidden or not
        assert names(folder, str(folder / given)) == [".git/e.txt"]
        return
    with pytest.raises(ConfigError, match=message) as error:
        make_plan([str(folder / given)])
    assert "\n" not in str(error.value)


def test_standard_input_is_text_or_lines() -> None:
    assert make_plan(["-"], stdin_suffix=".jsonl.gz").files[0].form == "json"
    with pytest.raises(ConfigError, match=r"--stdin .parquet: not supported for standard input"):
        make_plan(["-"], stdin_suffix=".parquet")
