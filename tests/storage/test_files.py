"""Files: hashed while they are written, replaced whole; and manifests that notice every damage."""

import os
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.storage import (
    MANIFEST,
    FileFacts,
    damage,
    fingerprint,
    foreign_files,
    is_complete,
    read_json,
    read_manifest,
    replace_file,
    replace_text,
    write_bytes,
    write_manifest,
    write_tensors,
    write_text,
)


def test_what_is_written_is_hashed_without_reading_it_again(tmp_path: Path) -> None:
    path, state = tmp_path / "state.pt", {"x": torch.arange(100_000), "y": [1, "two"]}
    facts = write_tensors(path, state)
    assert facts == fingerprint(path) == FileFacts(path.stat().st_size, facts.sha256)
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["x"], state["x"])
    assert loaded["y"] == state["y"]


class Stage(IntEnum):
    """Members that pickle themselves as they do in Python 3.11.0 to 3.11.3."""

    WEIGHTS = 3

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (type(self), self.name)


def test_enums_are_written_by_value_on_every_python(tmp_path: Path) -> None:
    write_tensors(tmp_path / "state.pt", {"zero_stage": Stage.WEIGHTS})
    with torch.serialization.safe_globals([Stage]):
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["zero_stage"] is Stage.WEIGHTS


@pytest.mark.parametrize(
    ("write", "content"), [(write_bytes, b"x"), (write_text, "x"), (write_tensors, {"x": 1})]
)
def test_what_is_written_is_flushed(
    write: Callable[[Path, Any], FileFacts],
    content: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flushed: list[tuple[int, int]] = []

    def flush(handle: int) -> None:
        status = os.fstat(handle)
        flushed.append((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fsync", flush)
    facts = write(tmp_path / "file", content)
    assert flushed == [((tmp_path / "file").stat().st_ino, facts.bytes)], "once, and the whole"


def test_a_text_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest"
    replace_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            replace_text(path, "new")

    def fail() -> None:
        with replace_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]


def test_a_file_and_its_name_are_flushed_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        calls.append("folder" if name == tmp_path.name else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    replace_text(tmp_path / "latest", "new")
    assert calls == ["file", "rename", "folder"]


@pytest.mark.parametrize("content", ["", "[1]", "{", '"text"', "[" * 100_000])
def test_json_that_is_none_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json .*: copy it again$") as error:
        read_json(tmp_path / "a.json", remedy="copy it again")
    assert "\n" not in str(error.value)


def make(folder: Path) -> Path:
    """A folder of two small files and their manifest."""
    (folder / "in").mkdir(parents=True)
    files = {name: write_text(folder / name, f"text of {name}") for name in ("in/a.pt", "b.pt")}
    write_manifest(folder, files, step=3)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("harm", "said", "sizes_tell"),
    [
        (lambda f: os.truncate(f / "b.pt", 5), "b.pt has 5 bytes, the manifest says 12", True),
        (lambda f: flip(f / "in/a.pt"), "a.pt does not have the SHA-256 of the manifest", False),
        (lambda f: (f / "in/a.pt").unlink(), "a.pt is missing", True),
        (lambda f: pipe(f / "b.pt"), "b.pt is not a regular file", True),
        (
            lambda f: (f / MANIFEST).unlink(),
            "no readable manifest.json: No such file or directory",
            True,
        ),
        (lambda f: (f / MANIFEST).write_text(""), "manifest.json is damaged", True),
        (lambda f: (f / MANIFEST).write_text('{"files": [1]}'), "manifest.json is damaged", True),
        (lambda f: (f / MANIFEST).write_text("[" * 100_000), "manifest.json is damaged", True),
        (
            lambda f: write_manifest(f, {"../b.pt": FileFacts(1, "")}),
            "manifest.json is damaged: '../b.pt' is not a file of the folder",
            True,
        ),
    ],
)
def test_damage_is_noticed_and_named(
    tmp_path: Path, harm: Callable[[Path], object], said: str, sizes_tell: bool
) -> None:
    folder = make(tmp_path / "folder")
    assert damage(folder) is None
    assert is_complete(folder)
    assert read_manifest(folder).keys() == {"in/a.pt", "b.pt"}
    harm(folder)
    problem = damage(folder)
    assert problem is not None
    assert problem.startswith(said)
    assert is_complete(folder) is not sizes_tell


def test_readers_share_the_reading_and_no_file_is_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    flip(folder / "in/a.pt")
    found = [damage(folder, share, 3) for share in range(3)]
    assert [problem is None for problem in found] == [True, False, True]


def test_what_no_manifest_names_is_foreign(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    assert foreign_files(folder) == []
    (folder / "in" / "notes.txt").write_text("mine")
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("b.pt")
    (folder / "tree").mkdir()
    (folder / "tree" / "tokens").write_text("1")
    (folder / "tree" / "mine").write_text("2")
    found = ["empty", "in/notes.txt", "link"]
    assert foreign_files(folder, ["tree/"]) == found
    assert foreign_files(folder, ["tree/tokens"]) == [*found, "tree/mine"]
    (folder / MANIFEST).unlink()
    assert foreign_files(folder, ["tree/", "in/a.pt"]) == ["b.pt", *found]
