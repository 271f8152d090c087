"""A disk that dies at a chosen system call, and forgets what was never flushed to it."""

import os
from pathlib import Path

import pytest

Content = dict[str, bytes]


class Died(BaseException):
    """The process is gone: nothing of it may run on."""


class FaultyDisk:
    """Counts the writes, flushes and renames of this process below a folder, and dies in the
    middle of one of them.

    It knows what a disk must have kept: of every file what it held when it was last flushed, of
    the folder the names it had then.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls, self.dies_at = folder, 0, 0
        self._kept: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._pwrite, self._replace = os.pwrite, os.replace
        monkeypatch.setattr(os, "pwrite", self._faulty_pwrite)
        monkeypatch.setattr(os, "fsync", self._faulty_fsync)
        monkeypatch.setattr(os, "replace", self._faulty_replace)

    def left_by_a_kill(self) -> Content:
        """What the system's cache holds: everything that was written."""
        return (
            {path.name: path.read_bytes() for path in self.folder.iterdir()}
            if self.folder.exists()
            else {}
        )

    def left_by_a_power_cut(self, *, names_are_kept: bool) -> Content:
        """Only what was flushed; renames may have reached the disk by themselves, without what
        they name.
        """
        names = self._current_names() if names_are_kept else self._names
        return {name: self._kept.get(inode, b"") for name, inode in names.items()}

    def _faulty_pwrite(self, handle: int, data: memoryview, offset: int) -> int:
        if self._dies():
            self._pwrite(handle, data[: len(data) // 2], offset)
            raise Died
        return self._pwrite(handle, data, offset)

    def _faulty_fsync(self, handle: int) -> None:
        if self._dies():
            raise Died
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path == self.folder:
            self._names = self._current_names()
        elif path.parent == self.folder:
            self._kept[path.stat().st_ino] = path.read_bytes()

    def _faulty_replace(self, source: Path, target: Path) -> None:
        if self._dies():
            raise Died
        self._replace(source, target)

    def _current_names(self) -> dict[str, int]:
        return (
            {path.name: path.stat().st_ino for path in self.folder.iterdir()}
            if self.folder.exists()
            else {}
        )

    def _dies(self) -> bool:
        self.calls += 1
        return self.calls == self.dies_at


def lay(folder: Path, content: Content) -> Path:
    """A folder with this content."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder
