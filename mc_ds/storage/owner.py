"""The process that holds a lock: who it is, and whether it still runs."""

import os
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ENDED = ("Z", "X")
"""States of a process that has ended and only waits for its parent."""


@dataclass(frozen=True)
class Owner:
    """A process, as a lock names it."""

    host: str
    pid: int
    started: str
    """When the process started, by its kernel's clock: a later one of the same number started
    later.
    """
    kernel: str
    """Boot and process namespace in which `pid` means this process; empty where neither can be
    told.
    """
    since: str
    """Date and time of locking, for people."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def this_process() -> Owner:
    """Return the calling process."""
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Owner(socket.gethostname(), pid, _started(pid) or "", _kernel(), since)


def holds(owner: Owner, file: os.stat_result) -> bool | None:
    """Return whether `owner` runs and has `file` open, so that a lock that was copied with its
    folder holds nothing.

    None where this kernel cannot tell, because another one runs the process.
    """
    if not _kernel() or owner.kernel != _kernel():
        return None
    if _started(owner.pid) != owner.started:
        return _is_hidden(owner.pid)
    try:
        return any(_is_open(handle, file) for handle in Path(f"/proc/{owner.pid}/fd").iterdir())
    except PermissionError:  # another user's: it runs, and that must do
        return True
    except OSError:  # it has just ended
        return False


def _is_open(handle: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(handle.stat(), file)
    except OSError:  # closed meanwhile
        return False


def _is_hidden(pid: int) -> bool:
    """Return whether a process runs that this user must not see."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return _started(pid) is None
    except (ProcessLookupError, OverflowError):
        pass
    return False


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; None where it has ended."""
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
