"""No orphans: a rank whose launcher has died stops as if it had been asked to, and is gone after
a grace period whatever it waits for.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mc_ds.training.guards.exit_codes import ExitCode

POLL_S = 0.5
GRACE_S = 120.0
"""Time for the last step and its checkpoint."""
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "torch/distributed")
"""Parts of the first arguments of Python programs that start ranks and watch over them."""


def launcher_processes(parent: int | None = None) -> list[int]:
    """Return the chain of launchers above this process, nearest first: its parent, and further up
    while that is a launcher too.
    """
    chain: list[int] = []
    process = os.getppid() if parent is None else parent
    while process > 1 and _is_launcher(process):
        chain.append(process)
        process = _parent_of(process)
    return chain


def guard_against_orphaning(chain: Sequence[int], ask_to_stop: Callable[[str], None]) -> None:
    """Watch `chain` from a thread: when any of it is gone, ask to stop, and after `GRACE_S` exits.
    Nothing to do for an empty chain.
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
    """Return its parent's id; 0 where it is gone or is a zombie, or the system has no /proc."""
    if process == os.getpid():
        return os.getppid()
    try:
        fields = (
            Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        )  # the name before may hold anything
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[1])


def _is_launcher(process: int) -> bool:
    """Return whether it is a Python process that runs a launcher; a shell that merely mentions one
    is not.
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
