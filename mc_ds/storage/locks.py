"""Exclusive locks between processes and hosts. The lock of a dead owner is taken over.

A lock is a file. A hard link creates it together with its content; all file systems, NFS and Lustre
included, let only one process create a link. The file names the lock's owner, who keeps it open and
updates its modification time every `BEAT_S` seconds.

On the same kernel, a contender asks the kernel whether the owner is alive. Otherwise the owner
counts as dead if it has not updated the time for `LEASE_S` seconds, by the contender's clock. An
owner that was suspended that long finds out in `Lock.check`.
"""

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.storage.lock_file import LockFile, read_lock, refers_to, write_lock
from mc_ds.storage.names import temporaries, temporary
from mc_ds.storage.owner import holds

BEAT_S = 5.0
"""Seconds between the owner's updates of the lock's modification time."""
LEASE_S = 90.0
"""Seconds without an update after which an owner on another host counts as dead. Network file
systems may show an update 60 s late.
"""
POLL_S = 1.0
"""Seconds between a contender's checks of a lock whose owner may be dead."""


class LockHeldError(ConfigError):
    """The lock is held by a living process; `owner` describes it."""

    def __init__(self, path: Path, owner: str) -> None:
        super().__init__(f"{path} is in use by {owner}: wait for it, or end it")
        self.owner = owner


class Lock:
    """An exclusive lock, held from construction until `release`, the end of the process, or the
    loss of the last reference.

    Raises LockHeldError if a living process, this one included, holds it. For an owner on another
    host this takes up to `LEASE_S` seconds, which one line to `report` announces. Raises
    ConfigError if `path` is a file that is not a lock, OSError if the folder cannot be written. On
    a full disk the lock does not name its owner.
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
        """Raise OSError if the lock was removed, or taken over while this process was suspended."""
        if not refers_to(self.path, self._file):
            raise OSError(errno.ESTALE, "the lock was lost to another process", str(self.path))

    def release(self) -> None:
        """Release the lock. Does nothing if it was already released or lost, or in a forked
        child.
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
        if refers_to(path, file):
            path.unlink(missing_ok=True)
        file.close()


def _acquire(path: Path, report: Callable[[str], None]) -> FileIO:
    """Acquire the lock and return its open file."""
    while True:
        found = read_lock(path)
        if found is not None and _is_alive(path, found, report):
            raise LockHeldError(path, found.owner_in_words())
        staging = temporary(path, "partial")
        file = write_lock(staging)
        try:
            if found is None:
                os.link(staging, path)
            else:
                _take_over(path, found, staging)
        except (FileExistsError, FileNotFoundError):
            # Another contender was faster, or removed our staging file; or a network file system
            # repeated a request that had succeeded.
            pass
        except BaseException:
            file.close()
            raise
        finally:
            staging.unlink(missing_ok=True)
        if refers_to(path, file):
            for leftover, _ in temporaries(path.parent, "partial", path.name):
                leftover.unlink(missing_ok=True)  # living contenders create another
            return file
        file.close()


def _take_over(path: Path, dead: LockFile, staging: Path) -> None:
    """Replace a dead owner's lock by `staging`, unless the lock has changed."""
    try:
        with Lock(path.with_name(f"{path.name}.takeover")):
            if dead.is_same_lock(read_lock(path)):
                os.replace(staging, path)
    except LockHeldError as held:
        raise LockHeldError(path, held.owner) from None


def _is_alive(path: Path, found: LockFile, report: Callable[[str], None]) -> bool:
    """Return whether the owner of a lock is alive. If this kernel cannot tell, watch the lock's
    file for up to `LEASE_S` seconds.
    """
    if found.owner is not None and (held := holds(found.owner, found.status)) is not None:
        return held
    owner = found.owner_in_words()
    report(f"{path} is held by {owner}: waiting up to {LEASE_S:g} s to see if it is alive")
    deadline = time.monotonic() + LEASE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = read_lock(path)
        if now is None or not found.is_same_lock(now):
            return False  # free, or has a new owner: the caller reads it again
        if now.status.st_mtime_ns != found.status.st_mtime_ns:
            return True
    return False
