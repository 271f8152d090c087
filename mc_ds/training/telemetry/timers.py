"""Timers that do not make the host wait: CUDA events on GPUs, the clock on CPUs; read after the
step has ended.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimers:
    """Milliseconds per named span, added up over the micro-steps of one optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._elapsed: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Times the work issued inside the block."""
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
        """Adds time measured elsewhere on the host."""
        self._elapsed[name] = self._elapsed.get(name, 0.0) + milliseconds

    def read(self) -> dict[str, float]:
        """Totals in ms. On GPUs call it when the step's work is known to be done; events that
        are not would block.
        """
        for name, start, end in self._events:
            end.synchronize()
            self.add(name, start.elapsed_time(end))
        self._events.clear()
        return dict(self._elapsed)
