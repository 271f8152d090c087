"""The file of a lock: it holds its owner's name as JSON, and its time is the owner's last sign
of life.
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
    """A lock's file as it was read."""

    content: bytes
    status: os.stat_result
    owner: Owner | None
    """None where a full disk had no room for its name."""

    def is_same_lock(self, other: "LockFile | None") -> bool:
        """Return whether `other` was read of the same lock, held by the same owner."""
        return (
            other is not None
            and self.content == other.content
            and os.path.samestat(self.status, other.status)
        )

    def owner_in_words(self) -> str:
        """Return who holds the lock, for people."""
        return str(self.owner or "an unknown process")


def write_lock(path: Path) -> FileIO:
    """Make a new file that names this process, and return it open. Raises OSError."""
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
    """Read a lock's file; return None where there is none. Raises ConfigError for a file that is
    not a lock.

    Opening asks a network file system for what is there now.
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


def names(path: Path, file: FileIO) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except (OSError, ValueError):  # gone, closed, or forgotten by a network file system
        return False


def _no_lock(path: Path) -> ConfigError:
    return ConfigError(f"{path} is not a lock of mc_ds: move it away, or give another folder")
