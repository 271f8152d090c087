"""One action in a forked child, under limits of time and memory: how it ended, and what it wrote."""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mc_ds.config import ConfigError

GUARD_S = 60.0
"""Seconds after which an action hangs."""
MEMORY = 2 << 30
"""Bytes of address space that an action may add."""


@dataclass(frozen=True)
class Outcome:
    """How an action ended."""

    said: str
    """"served"; "refused: " and one line; or what is wrong with it, in words."""
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether it was served, or refused in one line."""
        return self.said == "served" or self.said.startswith("refused: ")


def guarded(action: Callable[[], None]) -> Outcome:
    """Run `action` in a child that has `GUARD_S` seconds and `MEMORY` bytes."""
    started = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(action, write)
    os.close(write)
    said = _answer(read, started + GUARD_S)
    os.close(read)
    if said is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if said is None:
        said = f"it hangs: no end after {GUARD_S:g} s"
    elif not said:
        said = f"it ended with status {status} and said nothing"
    return Outcome(said, time.monotonic() - started)


def _child(action: Callable[[], None], write: int) -> None:
    """Run the action, tell how it ended, and leave without cleaning up what is the parent's."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(write, json.dumps(_ending(action)).encode()[:60_000])
    finally:
        os._exit(0)


def _ending(action: Callable[[], None]) -> str:
    try:
        action()
    except (ConfigError, OSError) as error:
        line = str(error)
        return f"refused: {line}" if line.isprintable() else f"several lines: {line!r}"
    except BaseException as error:
        place = traceback.extract_tb(sys.exc_info()[2])[-1]
        return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"[:500]
    return "served"


def _answer(pipe: int, deadline: float) -> str | None:
    """What the child wrote, empty where it died; None where the time is over."""
    content = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([pipe], [], [], left)[0]:
            break
        part = os.read(pipe, 1 << 16)
        if not part:
            return json.loads(content) if content else ""
        content += part
    return None


def entries(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder with its size and time: equal where nothing was written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found
