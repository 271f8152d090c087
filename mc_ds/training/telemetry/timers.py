"""Timers that never make the host wait: CUDA events on GPUs, the clock on CPUs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimers:
    """Sums milliseconds per name over the micro-steps of one optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._elapsed: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time the work issued in the block."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            before = time.perf_counter()
            yield
            self.add(name, 1e3 * (time.perf_counter() - before))

    def add(self, name: str, milliseconds: float) -> None:
        """Add a time that was measured elsewhere."""
        self._elapsed[name] = self._elapsed.get(name, 0.0) + milliseconds

    def read(self) -> dict[str, float]:
        """Return the sums in ms. On GPUs, waits for the timed work; call it when that is done."""
        for name, start, end in self._events:
            end.synchronize()
            self.add(name, start.elapsed_time(end))
        self._events.clear()
        return dict(self._elapsed)
