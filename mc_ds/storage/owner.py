"""The process that holds a lock, and whether it is still running."""

import os
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ENDED = ("Z", "X")
"""States of a process that has ended and waits for its parent (zombie, dead)."""


@dataclass(frozen=True)
class Owner:
    """A process, as recorded in a lock."""

    host: str
    pid: int
    started: str
    """Start time of the process by its kernel's clock, which distinguishes it from a later process
    with the same id.
    """
    kernel: str
    """Boot id and process namespace in which `pid` is valid; empty if unknown."""
    since: str
    """Date and time when the lock was acquired, for display."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def this_process() -> Owner:
    """Return the calling process as an Owner."""
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Owner(socket.gethostname(), pid, _started(pid) or "", _kernel(), since)


def holds(owner: Owner, file: os.stat_result) -> bool | None:
    """Return whether `owner` is running and has `file` open; None if this kernel cannot tell,
    because the process runs on another one.

    A mere copy of a lock file is not open in its owner, so it is not held.
    """
    if not _kernel() or owner.kernel != _kernel():
        return None
    if _started(owner.pid) != owner.started:
        return _is_hidden(owner.pid)
    try:
        return any(_is_open(handle, file) for handle in Path(f"/proc/{owner.pid}/fd").iterdir())
    except PermissionError:  # another user's process: it runs, but hides its files
        return True
    except OSError:  # it has just ended
        return False


def _is_open(handle: Path, file: os.stat_result) -> bool:
    try:
        return (
            handle.stat().st_ino == file.st_ino
        )  # not st_dev: two mounts of one file differ in it
    except OSError:  # closed meanwhile
        return False


def _is_hidden(pid: int) -> bool:
    """Return whether the process runs, but this user may not inspect it."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return _started(pid) is None
    except (ProcessLookupError, OverflowError):
        pass
    return False


def _started(pid: int) -> str | None:
    """Return the start time of a process in ticks since boot; None if it has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in ENDED else after_name[19]


@cache
def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
