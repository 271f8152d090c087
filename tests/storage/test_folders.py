"""Folders that appear whole: what is refused, what is flushed, and what is left alone. Kills
have a file of their own.
"""

import ctypes
import errno
import os
from pathlib import Path

import pytest

import mc_ds.storage.folders as folders
from mc_ds.config import ConfigError
from mc_ds.storage import LockHeldError, StagedFolder, recover, remove_leftovers, write_text

TOKEN = "0123456789abcdef"


def write(out: Path, text: str = "new") -> None:
    with StagedFolder(out) as staged:
        write_text(staged.path / "a", text)
        staged.publish(replaces=lambda path: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_bears_the_name_before_it_is_published(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "in" / "out") as staged:
        write_text(staged.path / "a", "new")
        assert staged.path.parent == tmp_path / "in"
        assert not (tmp_path / "in" / "out").exists()
        assert staged.publish() == tmp_path / "in" / "out"
    assert names(tmp_path / "in") == ["out"]
    assert names(tmp_path / "in" / "out") == ["a"]


def test_what_is_not_published_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with StagedFolder(tmp_path / "out") as staged:
            write_text(staged.path / "a", "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == []


def test_what_is_there_stays_unless_the_caller_knows_it(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")

    def refuse(path: Path) -> None:
        assert path == tmp_path / "out"
        raise ConfigError("not this one")

    for replaces, words in ((None, "out exists: give another name, or remove it"), (refuse, "not")):
        with pytest.raises(ConfigError, match=words), StagedFolder(tmp_path / "out") as staged:
            staged.publish(replaces=replaces)
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_two_writers_never_meet(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "out") as staged:
        with pytest.raises(LockHeldError, match=f"out is in use by process {os.getpid()} on "):
            StagedFolder(tmp_path / "out")
        write(tmp_path / "other")
        staged.publish()
    assert names(tmp_path) == ["other", "out"]


def test_the_folder_behind_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "out", "old")
    (tmp_path / "out").symlink_to("disk/out")
    write(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out" / "a").read_text() == "new"
    assert names(tmp_path) == ["disk", "out"]


def test_files_then_folders_then_the_name_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    with StagedFolder(tmp_path / "out") as staged:
        (staged.path / "in").mkdir()
        (staged.path / "in" / "a").write_text("a")
        monkeypatch.setattr(
            os, "fsync", lambda handle: flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        )
        staged.publish()
        inner = staged.path / "in"
    assert flushed == [inner / "a", inner, staged.path, tmp_path]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_exchange_takes_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class Library:
        @staticmethod
        def renameat2(*arguments: object) -> int:
            ctypes.set_errno(code)
            return -1

    write(tmp_path / "out", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Library)
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_between_the_two_steps_a_reader_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    rename, read = os.rename, []

    def slow(source: Path, target: Path) -> None:
        if not read and target == tmp_path / "out":
            read.append(True)
            recover(target)
            assert (target / "a").read_text() == "old"
        rename(source, target)

    monkeypatch.setattr(folders, "_exchange", lambda new, old: False)
    with StagedFolder(tmp_path / "out") as staged:
        write_text(staged.path / "a", "new")
        monkeypatch.setattr(os, "rename", slow)
        staged.publish(replaces=lambda path: None)
    assert read
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_leftovers_are_known_by_their_names_alone(tmp_path: Path) -> None:
    mine = ["notes", "notes.old", "notes.partial", f"notes.partial-{TOKEN}x", "notes.partial-1"]
    for name in [*mine, f"notes.partial-{TOKEN}", f"other.partial-{TOKEN}"]:
        (tmp_path / name).mkdir()
    (tmp_path / f"notes.replaced-{TOKEN}").mkdir()
    remove_leftovers(tmp_path, "notes")
    assert names(tmp_path) == sorted([*mine, f"other.partial-{TOKEN}"])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(mine)


def test_the_only_copy_is_no_leftover(tmp_path: Path) -> None:
    replaced = tmp_path / f"out.replaced-{TOKEN}"
    replaced.mkdir()
    (replaced / "a").write_text("old")
    remove_leftovers(tmp_path, "out")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]
