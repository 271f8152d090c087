"""Files that are on disk when they are said to be: flushed, hashed while they are written, replaced whole."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

from mc_ds.config.errors import ConfigError


class FileProof(NamedTuple):
    """What a file must be."""

    size: int
    sha256: str


class HashingFile(io.RawIOBase):
    """A new file that hashes what is written to it, so that nothing has to be read again."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any, /) -> int:
        """Writes and hashes `data`, a bytes-like object."""
        self._file.write(data)
        self._digest.update(data)
        self._size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Passes buffered bytes on to the system."""
        self._file.flush()

    def finish(self) -> FileProof:
        """Flushes to disk and returns what the file must be from now on."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileProof(self._size, self._digest.hexdigest())

    def close(self) -> None:
        """Closes the file, whatever state it is in."""
        if not self.closed:
            super().close()
            self._file.close()


def write_text(path: Path, text: str) -> FileProof:
    """Writes a small text file through to disk."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> FileProof:
    """Writes a small file through to disk."""
    file = HashingFile(path)
    try:
        file.write(content)
        return file.finish()
    finally:
        file.close()


def write_tensors(path: Path, state: Any) -> FileProof:
    """`torch.save` through to disk. Raises OSError or RuntimeError where it cannot be written."""
    file = HashingFile(path)
    try:
        torch.save(state, cast(IO[bytes], file))
        return file.finish()
    finally:
        file.close()


def replace_text(path: Path, text: str) -> None:
    """Writes a small file so that readers see the old or the new text, never a part."""
    aside = path.with_name(f"{path.name}.new")
    write_text(aside, text)
    aside.replace(path)
    sync_folder(path.parent)


def prove(path: Path) -> FileProof:
    """Reads and hashes a whole file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileProof(os.fstat(file.fileno()).st_size, digest)


def file_damage(path: Path, expected: FileProof, *, read: bool = True) -> str | None:
    """What is wrong with a file, or None; with `read` it is read and hashed whole, else only its size counts."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path.name} has {size} bytes, the manifest says {expected.size}"
        if read and prove(path) != expected:
            return f"{path.name} does not have the SHA-256 of the manifest"
    except OSError as error:
        return (
            f"{path.name} is missing"
            if isinstance(error, FileNotFoundError)
            else f"{path.name} cannot be read: {reason(error)}"
        )
    return None


def sync_folder(folder: Path) -> None:
    """Makes created and renamed names inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: BaseException) -> str:
    """An error as part of a line: what the system said, and of which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
    return f"{type(error).__name__}: {first_line}"


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The JSON object of a file. Raises ConfigError, in one line that ends with `remedy`, where it cannot be read or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}: {remedy}") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, should be a JSON object: {remedy}"
        )
    return content
