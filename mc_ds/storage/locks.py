"""Locks that hold between processes and hosts: one owner at a time, and a dead owner's lock is
taken over.

A lock is a file that appears together with its content, by a hard link: file systems make links
exclusively, NFS and Lustre among them. It names its owner, who keeps it open and renews its time
every `BEAT_S`. Where owner and contender share a kernel, the kernel knows whether the owner
lives; elsewhere an owner that shows no sign of life for `LEASE_S`, on the contender's clock, is
dead. An owner that merely stood still for so long finds out by `Lock.check`.
"""

import errno
import json
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.storage.names import temporaries, temporary
from mc_ds.storage.owner import Owner, holds, this_process

BEAT_S = 5.0
"""Seconds between the owner's signs of life."""
LEASE_S = 90.0
"""Seconds of silence after which an owner elsewhere is dead. Network file systems may show a
file's time 60 s late.
"""
POLL_S = 1.0
"""Seconds between a contender's looks at a lock whose owner may be dead."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class LockHeldError(ConfigError):
    """A lock that a living process holds; `owner` names it, in words."""

    def __init__(self, path: Path, owner: str) -> None:
        super().__init__(f"{path} is in use by {owner}: wait for it, or end it")
        self.owner = owner


class Lock:
    """An exclusive lock, from its making to `release`, the end of the process, or of the last
    reference.

    Raises LockHeldError where a living process, this one included, holds it, which takes up to
    `LEASE_S` to learn of another host (`report` gets one line then); ConfigError where `path` is
    a file that is no lock; OSError where the folder cannot be written. On a full disk the lock
    is made without its owner's name.
    """

    def __init__(self, path: Path, *, report: Callable[[str], None] = lambda line: None) -> None:
        self.path = path
        self._file = _acquire(path, report)
        over, closing = threading.Event(), threading.RLock()
        beats = threading.Thread(target=_beat, args=(self._file, over, closing), daemon=True)
        self._release = weakref.finalize(
            self, _release, path, self._file, over, closing, os.getpid()
        )
        beats.start()

    def check(self) -> None:
        """Raise OSError where the lock was removed, or taken over while this process stood
        still.
        """
        if not _is_same(path := self.path, self._file):
            raise OSError(errno.ESTALE, "the lock was lost to another process", str(path))

    def release(self) -> None:
        """Free the lock; do nothing a second time, in a forked child, or where the lock was
        lost.
        """
        self._release()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _beat(file: FileIO, over: threading.Event, closing: threading.RLock) -> None:
    while not over.wait(BEAT_S):
        with closing, suppress(OSError, ValueError):  # ValueError: closed meanwhile
            os.utime(file.fileno())


def _release(
    path: Path, file: FileIO, over: threading.Event, closing: threading.RLock, owner: int
) -> None:
    if os.getpid() != owner:
        return
    over.set()
    with closing:
        if _is_same(path, file):
            path.unlink(missing_ok=True)
        file.close()


def _is_same(path: Path, file: FileIO) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except (OSError, ValueError):  # gone, closed, or forgotten by a network file system
        return False


@dataclass(frozen=True)
class _Found:
    """A lock's file as it was read."""

    content: bytes
    status: os.stat_result
    """Its modification time is that of the owner's last sign of life."""

    def is_same_lock(self, other: "_Found | None") -> bool:
        return (
            other is not None
            and self.content == other.content
            and os.path.samestat(self.status, other.status)
        )


def _acquire(path: Path, report: Callable[[str], None]) -> FileIO:
    """Return the open file of the lock, once it is this process's."""
    while True:
        found = _read(path)
        if found is not None and _is_alive(path, found, report):
            raise LockHeldError(path, _owner_in_words(path, found))
        staging = temporary(path, "partial")
        file = _write_owner(staging)
        try:
            if found is None:
                os.link(staging, path)
            elif not _take_over(path, found, staging):
                raise FileExistsError
        except (FileExistsError, FileNotFoundError):  # another contender was faster, or swept up
            file.close()
            continue
        except BaseException:
            file.close()
            raise
        finally:
            staging.unlink(missing_ok=True)
        for leftover, _ in temporaries(path.parent, "partial", path.name):
            leftover.unlink(missing_ok=True)  # a contender that lives makes another
        return file


def _take_over(path: Path, dead: _Found, staging: Path) -> bool:
    """Put `staging` in the place of a dead owner's lock; False where that is no longer there."""
    try:
        with Lock(path.with_name(f"{path.name}.takeover")):
            if not dead.is_same_lock(_read(path)):
                return False
            os.replace(staging, path)
            return True
    except LockHeldError as held:
        raise LockHeldError(path, held.owner) from None


def _write_owner(staging: Path) -> FileIO:
    """Make the file that becomes the lock, open."""
    file = FileIO(staging, "xb")
    try:
        file.write(json.dumps(asdict(this_process())).encode())
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_ROOM:
            file.close()
            staging.unlink(missing_ok=True)
            raise
        file.truncate(0)
    return file


def _read(path: Path) -> _Found | None:
    """Read a lock's file; None where there is none. Opening asks a network file system for what
    is there now.
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
        return _Found(os.read(handle, 1 << 12), status)
    finally:
        os.close(handle)


def _owner(path: Path, found: _Found) -> Owner | None:
    """Return the owner that a lock names; None where a full disk had no room for it."""
    try:
        return Owner(**json.loads(found.content)) if found.content else None
    except (ValueError, TypeError):
        raise _no_lock(path) from None


def _owner_in_words(path: Path, found: _Found) -> str:
    return str(_owner(path, found) or "an unknown process")


def _is_alive(path: Path, found: _Found, report: Callable[[str], None]) -> bool:
    """Return whether the owner of a lock lives; watches its file where this kernel cannot tell."""
    owner = _owner(path, found)
    if owner is not None and (held := holds(owner, found.status)) is not None:
        return held
    report(f"{path} is held by {owner}: waiting up to {LEASE_S:g} s for a sign of life")
    deadline = time.monotonic() + LEASE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = _read(path)
        if now is None or not found.is_same_lock(now):
            return False  # the lock is free or another's: whoever takes it over looks again
        if now.status.st_mtime_ns != found.status.st_mtime_ns:
            return True
    return False


def _no_lock(path: Path) -> ConfigError:
    return ConfigError(f"{path} is no lock of mc_ds: move it away, or give another folder")
