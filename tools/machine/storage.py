"""Checks of folders: free space, write speed, and operations that checkpoints and the data cache
need.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from machine.findings import Finding, Status
from mc_ds.storage import Lock

GB = 10**9
LITTLE_BYTES, TOO_LITTLE_BYTES = 20 * GB, GB
"""Free space below which a folder gets a warning, and below which it fails: a checkpoint is 16
bytes per parameter.
"""
SLOW_MB_PER_S = 100.0
"""Write speed below which the 20 GB checkpoint of a 1.3 B model takes more than three minutes."""
WRITE_SECONDS, WRITE_BYTES, CHUNK_BYTES = 1.5, 256 * 2**20, 8 * 2**20
SHARED_MEMORY = Path("/dev/shm")
LITTLE_SHARED_BYTES = GB


def check_folder(folder: Path, subject: str) -> Iterator[Finding]:
    """Check a folder (or its nearest existing ancestor) by writing and removing a file of some
    megabytes.
    """
    place = _existing(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as scratch:
            speed = _write_speed(Path(scratch))
            trouble = _missing_abilities(Path(scratch))
    except OSError as error:
        fix = (
            f"free space there, or give yourself the right to write: df -h {place}; ls -ld {place}"
        )
        yield Finding(Status.FAIL, subject, f"{folder} cannot be written ({error.strerror})", fix)
        return
    free = shutil.disk_usage(place).free
    found = f"{folder}: {free / GB:,.0f} GB free, writes {speed:,.0f} MB/s"
    if trouble:
        yield Finding(
            Status.FAIL,
            subject,
            f"{folder}: {trouble}",
            "use a file system that can (local, NFS, Lustre)",
        )
    elif free < TOO_LITTLE_BYTES:
        yield Finding(Status.FAIL, subject, found, f"free space on {place}: no checkpoint fits")
    elif free < LITTLE_BYTES:
        yield Finding(
            Status.WARN,
            subject,
            found,
            "a checkpoint takes 16 bytes per parameter, checkpoint.keep_last + 1 of them at a time",
        )
    elif speed < SLOW_MB_PER_S:
        yield Finding(
            Status.WARN,
            subject,
            found,
            "checkpoints will stall the run: use a faster file system, or a longer"
            " checkpoint.interval",
        )
    else:
        yield Finding(Status.OK, subject, found)


def check_shared_memory() -> Iterator[Finding]:
    """Check /dev/shm, through which loader processes and NCCL pass data."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    found = f"{SHARED_MEMORY}: {free / GB:.1f} GB free"
    if free < LITTLE_SHARED_BYTES:
        fix = (
            "start the container with --shm-size=16g or --ipc=host, and remove what ended processes"
            " left there"
        )
        yield Finding(Status.WARN, "shared memory", found, fix)
    else:
        yield Finding(Status.OK, "shared memory", found)


def _existing(folder: Path) -> Path:
    """Return the folder itself or its nearest existing ancestor."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def _write_speed(folder: Path) -> float:
    """Return the speed of writing and flushing in MB/s, measured over at most `WRITE_BYTES` and
    about `WRITE_SECONDS`.
    """
    chunk, written, started = os.urandom(CHUNK_BYTES), 0, time.perf_counter()
    with (folder / "speed").open("wb") as file:
        while written < WRITE_BYTES and time.perf_counter() - started < WRITE_SECONDS:
            file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            written += CHUNK_BYTES
    return written / 1e6 / (time.perf_counter() - started)


def _missing_abilities(folder: Path) -> str:
    """Return the operations that runs need and the file system lacks: renaming folders, and hard
    links, which locks need.
    """
    (folder / "staging").mkdir()
    (folder / "staging" / "file").touch()
    (folder / "staging").rename(folder / "whole")
    if not (folder / "whole" / "file").exists():
        return "renaming a folder loses its files"
    try:
        with Lock(folder / "lock"):
            return ""
    except OSError as error:
        return f"cannot make locks, which are hard links ({error.strerror})"
