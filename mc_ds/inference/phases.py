"""Measure the time that a session spends in each phase, without synchronising with the device.

On a GPU, events in the stream measure the time; only reading the totals synchronises. Phases may be
nested: the time of an inner phase is not counted for the outer one.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("ingest", "tree", "search", "lens", "allocator", "recompute", "decode")
"""In this order: bulk ingest; computing nodes and reading entries of the tree (generated tokens
that complete no block are not measured); search for blocks; LensNet; everything else that a policy
does; recomputing the cache after edits; decoder steps and logits.
"""
FOCUS_PHASES = ("tree", "search", "lens", "allocator")
"""The phases that choosing a context costs, compared with a plain decoder."""


class Phases:
    """Seconds and number of calls of each phase, since construction or the last `reset`."""

    MAX_OPEN = 4096
    """Largest number of event pairs kept before their times are added up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Set all times and counts to zero."""
        self.calls: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._open: list[tuple[str, Any, Any]] = []
        self._stack: list[tuple[str, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the time within the block as phase `name`."""
        now = self._mark()
        if self._stack:
            outer, since = self._stack.pop()
            self._add(outer, since, now)
            self._stack.append((outer, None))
        self._stack.append((name, now))
        self.calls[name] += 1
        try:
            yield
        finally:
            now = self._mark()
            self._add(*self._stack.pop(), now)
            if self._stack:
                self._stack[-1] = (self._stack[-1][0], now)

    def seconds(self) -> dict[str, float]:
        """Return the total seconds of every phase. Waits for the device."""
        if self._open:
            self._open[-1][2].synchronize()
            self._settle()
        return {name: float(self._seconds[name]) for name in PHASES}

    def focus_seconds(self) -> float:
        """Return the seconds of FOCUS_PHASES."""
        seconds = self.seconds()
        return sum(seconds[name] for name in FOCUS_PHASES)

    def focus_share(self) -> float:
        """Return the fraction of the time of all phases except bulk ingest that is spent in
        FOCUS_PHASES.
        """
        whole = sum(value for name, value in self.seconds().items() if name != "ingest")
        return self.focus_seconds() / whole if whole else 0.0

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add(self, name: str, since: Any, now: Any) -> None:
        if self._device.type != "cuda":
            self._seconds[name] += now - since
            return
        self._open.append((name, since, now))
        if len(self._open) >= self.MAX_OPEN:
            self._settle(keep=self.MAX_OPEN // 2)

    def _settle(self, keep: int = 0) -> None:
        """Add up the times of all event pairs except the last `keep`. The device has passed these
        long ago, so this hardly waits.
        """
        done, self._open = (
            self._open[: len(self._open) - keep],
            self._open[len(self._open) - keep :],
        )
        if done:
            done[-1][2].synchronize()
        for name, since, now in done:
            self._seconds[name] += since.elapsed_time(now) / 1000
