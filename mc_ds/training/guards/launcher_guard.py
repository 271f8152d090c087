"""Prevents orphans: a rank whose launcher has died stops as after a signal, and after a grace
period exits in any case.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mc_ds.training.guards.exit_codes import ExitCode

POLL_S = 0.5
GRACE_S = 120.0
"""Grace period in seconds, for the last step and its checkpoint."""
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "torch/distributed")
"""A Python program is a launcher if its command line contains one of these."""


def launcher_processes(parent: int | None = None) -> list[int]:
    """Return the process ids of this process's launchers, nearest first: its parent and further
    ancestors, up to the first one that is not a launcher.
    """
    chain: list[int] = []
    process = os.getppid() if parent is None else parent
    while process > 1 and _is_launcher(process):
        chain.append(process)
        process = _parent_of(process)
    return chain


def guard_against_orphaning(chain: Sequence[int], ask_to_stop: Callable[[str], None]) -> None:
    """Watch the launchers `chain` from a thread. If one dies, call `ask_to_stop`, and exit GRACE_S
    seconds later. Does nothing for an empty chain.
    """
    if chain:
        threading.Thread(
            target=_watch, args=(chain, ask_to_stop), name="launcher-guard", daemon=True
        ).start()


def _watch(chain: Sequence[int], ask_to_stop: Callable[[str], None]) -> None:
    while _intact(chain):
        time.sleep(POLL_S)
    ask_to_stop("death of the launcher")
    time.sleep(GRACE_S)
    os._exit(ExitCode.FAILED)


def _intact(chain: Sequence[int]) -> bool:
    """Return whether each process of the chain is still the parent of the one below it."""
    children = [os.getpid(), *chain[:-1]]
    return all(_parent_of(child) == parent for child, parent in zip(children, chain, strict=True))


def _parent_of(process: int) -> int:
    """Return the id of a process's parent; 0 if the process is gone or a zombie, or without
    /proc.
    """
    if process == os.getpid():
        return os.getppid()
    try:
        # Skip the process name in parentheses, which may contain anything.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[1])


def _is_launcher(process: int) -> bool:
    """Return whether a process is Python running a launcher (not e.g. a shell that mentions
    one).
    """
    try:
        program, *arguments = (
            Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:4]
        )
    except OSError:
        return False
    return Path(program).name.startswith("python") and any(
        name in argument for name in LAUNCHERS for argument in arguments
    )
