"""Durable files: flushed to disk, hashed while they are written, replaced atomically."""

import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, cast

import torch

from mc_ds.storage.names import temporary
from mc_ds.storage.reading import open_regular


class FileFacts(NamedTuple):
    """Size in bytes and hexadecimal SHA-256 of a file's content."""

    bytes: int
    sha256: str


class HashingFile(io.RawIOBase):
    """A new file that hashes its content while it is written, which saves reading it again."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = 0

    def writable(self) -> bool:
        """Return True, as `io.RawIOBase` requires of a writable file."""
        return True

    def write(self, data: Any, /) -> int:
        """Write and hash `data`, a bytes-like object; return its size in bytes."""
        self._file.write(data)
        self._digest.update(data)
        size = memoryview(data).nbytes
        self._bytes += size
        return size

    def flush(self) -> None:
        """Pass buffered bytes to the operating system."""
        self._file.flush()

    def finish(self) -> FileFacts:
        """Flush to disk, and return size and hash of everything written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileFacts(self._bytes, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file. Can be called repeatedly."""
        if not self.closed:
            super().close()
            self._file.close()


def write_text(path: Path, text: str) -> FileFacts:
    """Write a text file, overwriting its content, flush it to disk, and return its size and
    hash.
    """
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> FileFacts:
    """Write a file, overwriting its content, flush it to disk, and return its size and hash."""
    file = HashingFile(path)
    try:
        file.write(content)
        return file.finish()
    finally:
        file.close()


class _Pickler(pickle.Pickler):
    """Writes enum members by value on every Python. Python 3.11.0 to 3.11.3 would write a call of
    `getattr`, which is refused when the file is read, because it could run code.
    """

    def reducer_override(self, obj: Any) -> Any:
        return (type(obj), (obj.value,)) if isinstance(obj, Enum) else NotImplemented


PICKLE = ModuleType("pickle")
"""The module pickle, with that pickler."""
PICKLE.__dict__.update(vars(pickle), Pickler=_Pickler)


def write_tensors(path: Path, state: Any) -> FileFacts:
    """Save `state` with `torch.save`, flush the file to disk, and return its size and hash. Raises
    OSError or RuntimeError on failure.
    """
    file = HashingFile(path)
    try:
        torch.save(state, cast(IO[bytes], file), pickle_module=PICKLE)
        return file.finish()
    finally:
        file.close()


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for writing, which atomically and durably replaces `path` when the block ends
    without an error.

    Readers see the old or the complete new content. After an error `path` is unchanged.
    """
    staging = temporary(path, "partial")
    try:
        with staging.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace the content of `path` with `text`. See `replace_file`."""
    with replace_file(path) as file:
        file.write(text.encode())


def sync_file(path: Path) -> None:
    """Flush to disk a file that other code has written. Raises OSError for a symbolic link."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make created, renamed and removed names inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(path: Path) -> FileFacts:
    """Read a whole file, and return its size and hash. Raises OSError if it is not a regular
    file.
    """
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileFacts(os.fstat(file.fileno()).st_size, digest)
