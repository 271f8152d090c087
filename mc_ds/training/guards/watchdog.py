"""The watchdog: ends a hanging process with an error that names rank, step and last phase, and
writes the stacks of all threads to disk.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Self

from mc_ds.training.guards.exit_codes import ExitCode


class Watchdog:
    """Context manager that ends the process if `mark` is not called for `timeout_s` seconds (0:
    never).

    Every rank has one. In a hang all ranks report, and the one with a different phase is probably
    the cause.
    """

    def __init__(self, timeout_s: float, rank: int, folder: Path) -> None:
        self.timeout_s, self.rank, self.folder = timeout_s, rank, folder
        self.step = 0
        self._last: tuple[str, float] = ("start", time.monotonic())
        self._ended = threading.Event()

    def mark(self, phase: str) -> None:
        """Record that `phase` begins. Costs one assignment, so it may be called anywhere."""
        self._last = (phase, time.monotonic())

    def rest(self, phase: str) -> None:
        """Record that a phase begins in which this rank only waits for others. It is not timed,
        because the others have watchdogs too.
        """
        self._last = (phase, math.inf)

    def __enter__(self) -> Self:
        self.mark("start")
        if self.timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout_s / 10)):
            phase, since = self._last
            if time.monotonic() - since > self.timeout_s:
                self._end(phase)

    def _end(self, phase: str) -> None:
        stacks = self.folder / f"hang-rank{self.rank}.txt"
        try:
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"stacks of all threads in {stacks}"
        except OSError as error:
            where = f"no stacks, {stacks} cannot be written: {error.strerror}"
        print(
            f"error: rank {self.rank} hangs: no progress for {self.timeout_s:g} s"
            f" (health.watchdog_timeout_s) in step {self.step}, last phase {phase!r}; {where}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ExitCode.HANG)
