"""Measures how much host memory this process can still allocate."""

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def available_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that can be allocated before the host, or a cgroup of this process, runs out
    of memory. Slurm and containers limit the memory of jobs with cgroups.
    """
    return min([psutil.virtual_memory().available, *_left_in_cgroups(cgroups, own)])


def _left_in_cgroups(cgroups: Path, own: Path) -> list[int]:
    """Return the bytes left below the limit of each cgroup (version 2) of this process."""
    try:
        entries = own.read_text().splitlines()
    except OSError:
        return []
    names = [entry.removeprefix("0::/") for entry in entries if entry.startswith("0::/")]
    groups = [group for name in names for group in (cgroups / name, *(cgroups / name).parents)]
    left = []
    for group in groups:
        if not group.is_relative_to(cgroups):
            continue
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            statistics = (group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # not limited, or not visible from here
            continue
        if limit != "max":
            cached = sum(
                int(line.split()[1]) for line in statistics if line.startswith("inactive_file ")
            )
            left.append(int(limit) - used + cached)
    return left
