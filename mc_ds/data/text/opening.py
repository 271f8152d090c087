"""Opens input files and decompresses them. A file that cannot be read completely is a Fault."""

import errno
import gzip
import os
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any

from mc_ds.config.errors import ConfigError
from mc_ds.data.text.faults import Fault
from mc_ds.data.text.plan import InputFile
from mc_ds.storage import reason

BUFFER_BYTES = 1 << 20
"""Bytes decompressed at a time."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, when writing a temporary copy. They are not faults of the input."""


def need_pyarrow(what: str) -> Any:
    """Import and return `pyarrow`. If missing, raises ConfigError saying that `what` needs it."""
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(f"{what} needs the package pyarrow: pip install 'mc_ds[data]'") from None
    return pyarrow


@contextmanager
def opened(file: InputFile) -> Iterator[tuple[BufferedReader, IO[bytes]]]:
    """Open a file for the block, in which it should be read to its end.

    Yields the decompressed content, and the file as stored, whose position shows progress. Raises
    Fault if it cannot be opened, read or decompressed, or if it changed during the block, and
    OSError if the disk has no room for a temporary copy.
    """
    try:
        with _raw(file.path) as raw, _decompressed(raw, file) as content:
            before = os.fstat(raw.fileno())
            yield content, raw
            after = os.fstat(raw.fileno())
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        raise Fault(
            "unreadable file", f"{file.name} cannot be read completely: {reason(error)}"
        ) from None
    if stat.S_ISREG(after.st_mode) and _version(before) != _version(after):
        raise Fault(
            "file that changed",
            f"{file.name} changed while it was being read: try again when nothing writes to it",
        )


@contextmanager
def seekable(content: IO[bytes]) -> Iterator[IO[bytes]]:
    """Copy a stream into a temporary file, which is deleted after the block."""
    with tempfile.TemporaryFile() as copy:
        while part := content.read(BUFFER_BYTES):
            copy.write(part)
        copy.seek(0)
        yield copy


def _raw(path: Path) -> BufferedReader:
    if path == Path("/dev/stdin"):
        return BufferedReader(_Pipe(os.dup(sys.stdin.fileno())))
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(handle, "rb")


class _Pipe(FileIO):
    """A file that may be a pipe. `tell` counts the bytes read, which a pipe cannot."""

    _position = 0

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        self._position += count or 0
        return count

    def tell(self) -> int:
        return self._position


def _decompressed(raw: BufferedReader, file: InputFile) -> AbstractContextManager[BufferedReader]:
    """Return the decompressed content. A truncated stream raises when its end is reached."""
    if file.compression == ".gz":
        return BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER_BYTES)
    if file.compression == ".zst":
        pyarrow = need_pyarrow(f"reading {file.name}")
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        return BufferedReader(stream, BUFFER_BYTES)
    return nullcontext(raw)


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
