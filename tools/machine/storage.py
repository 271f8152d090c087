"""Checks of folders: free space, write speed, and the operations that runs need."""

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
"""Free space below which there is a warning or a failure. A checkpoint takes 16 bytes per
parameter.
"""
SLOW_MB_PER_S = 100.0
"""Write speed below which there is a warning: a 20 GB checkpoint (1.3 B parameters) then takes over
three minutes.
"""
WRITE_SECONDS, WRITE_BYTES, CHUNK_BYTES = 1.5, 256 * 2**20, 8 * 2**20
SHARED_MEMORY = Path("/dev/shm")
LITTLE_SHARED_BYTES = GB


def check_folder(folder: Path, subject: str) -> Iterator[Finding]:
    """Check a folder, or its nearest existing ancestor, by writing and removing up to 256 MiB."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as scratch:
            speed = _write_speed(Path(scratch))
            problem = _unsupported_operation(Path(scratch))
    except OSError as error:
        fix = f"free space there, or change its permissions: see df -h {place}; ls -ld {place}"
        yield Finding(Status.FAIL, subject, f"{folder} cannot be written ({error.strerror})", fix)
        return
    free = shutil.disk_usage(place).free
    found = f"{folder}: {free / GB:,.0f} GB free, writes {speed:,.0f} MB/s"
    if problem:
        yield Finding(
            Status.FAIL,
            subject,
            f"{folder}: {problem}",
            "use a file system that supports this (local, NFS, Lustre)",
        )
    elif free < TOO_LITTLE_BYTES:
        yield Finding(
            Status.FAIL, subject, found, f"too little for a checkpoint: free space on {place}"
        )
    elif free < LITTLE_BYTES:
        yield Finding(
            Status.WARN,
            subject,
            found,
            "free space if needed: up to checkpoint.keep_last + 1 checkpoints of 16 bytes per"
            " parameter",
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
    """Check the free space of /dev/shm, which loader processes and NCCL use."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    found = f"{SHARED_MEMORY}: {free / GB:.1f} GB free"
    if free < LITTLE_SHARED_BYTES:
        fix = (
            "start the container with --shm-size=16g or --ipc=host, and remove files left there by"
            " dead processes"
        )
        yield Finding(Status.WARN, "shared memory", found, fix)
    else:
        yield Finding(Status.OK, "shared memory", found)


def _existing(folder: Path) -> Path:
    """Return the folder or its nearest existing ancestor."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def _write_speed(folder: Path) -> float:
    """Return the speed of synced writes in MB/s, for at most WRITE_BYTES and about
    WRITE_SECONDS.
    """
    chunk, written, started = os.urandom(CHUNK_BYTES), 0, time.perf_counter()
    with (folder / "speed").open("wb") as file:
        while written < WRITE_BYTES and time.perf_counter() - started < WRITE_SECONDS:
            file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            written += CHUNK_BYTES
    return written / 1e6 / (time.perf_counter() - started)


def _unsupported_operation(folder: Path) -> str:
    """Return the operation that fails on this file system: renaming folders, or hard links (for
    locks). Empty if both work.
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
        return f"hard links, which locks need, do not work ({error.strerror})"
