"""The file of a lock. It contains its owner as JSON; the owner updates its modification time while
alive.
"""

import errno
import json
import os
import stat
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.storage.owner import Owner, this_process

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class LockFile:
    """Content and status of a lock's file, as read."""

    content: bytes
    status: os.stat_result
    owner: Owner | None
    """None if the disk was full when the lock was made."""

    def is_same_lock(self, other: "LockFile | None") -> bool:
        """Return whether `other` is the same lock, held by the same owner."""
        return (
            other is not None
            and self.content == other.content
            and os.path.samestat(self.status, other.status)
        )

    def owner_in_words(self) -> str:
        """Return the owner of the lock as text."""
        return str(self.owner or "an unknown process")


def write_lock(path: Path) -> FileIO:
    """Create a file that names this process, and return it open. Raises OSError on failure, except
    that on a full disk the file stays empty.
    """
    file = FileIO(path, "xb")
    try:
        file.write(json.dumps(asdict(this_process())).encode())
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_ROOM:
            file.close()
            path.unlink(missing_ok=True)
            raise
        file.truncate(0)
    return file


def read_lock(path: Path) -> LockFile | None:
    """Read a lock's file; return None if there is none. Raises ConfigError for a file that is not a
    lock.

    Opening the file makes a network file system refresh its cached attributes.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _no_lock(path) from None
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise _no_lock(path)
        content = os.read(handle, 1 << 12)
    finally:
        os.close(handle)
    try:
        return LockFile(content, status, Owner(**json.loads(content)) if content else None)
    except (ValueError, TypeError):
        raise _no_lock(path) from None


def refers_to(path: Path, file: FileIO) -> bool:
    """Return whether `path` still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except (OSError, ValueError):  # removed, closed, or stale on a network file system
        return False


def _no_lock(path: Path) -> ConfigError:
    return ConfigError(f"{path} is not a lock of mc_ds: move it away, or give another folder")
