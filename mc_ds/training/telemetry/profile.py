"""`--profile STEP:N`: writes a trace of N steps for Perfetto, and lists the longest phases."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MOST = 10
"""Number of phases listed."""


class Profile:
    """Traces N steps after step STEP, for `steps` = (STEP, N); None: only forwards marks.

    A phase lasts from one call of `mark` to the next. Its time is measured on GPUs by events in the
    stream, so that nothing waits, and on CPUs by the clock. Phases also appear in the trace.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        folder: Path,
        device: torch.device,
        mark: Callable[[str], None],
    ) -> None:
        self._first, self._steps = steps or (-1, 0)
        self._folder, self._device, self._forward = folder, device, mark
        self._trace: torch.profiler.profile | None = None
        self._open: Any = None
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """End the current phase and begin `phase`."""
        self._forward(phase)
        if self._trace is not None:
            self._close_phase()
            self._marks.append((phase, self._now()))
            self._open = torch.profiler.record_function(phase)
            self._open.__enter__()

    def between(self, step: int) -> list[str]:
        """Start or end the trace if that is due after `step` steps; return lines to print."""
        if step == self._first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.start()
        elif step == self._first + self._steps and self._trace is not None:
            trace, self._trace = self._trace, None
            self._close_phase()
            self._marks.append(("", self._now()))
            trace.stop()
            return self._report(trace)
        return []

    def _report(self, trace: torch.profiler.profile) -> list[str]:
        """Write the trace; return lines with its path and the time of the longest phases."""
        self._forward("profile")
        path = self._folder / f"trace_step_{self._first:08d}.json.gz"
        trace.export_chrome_trace(str(path))
        phases: dict[str, float] = {}
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            phases[phase] = phases.get(phase, 0.0) + self._milliseconds(begun, ended)
        total = sum(phases.values()) or 1.0
        ranked = sorted(phases.items(), key=lambda phase: -phase[1])[:MOST]
        return [
            f"profile of {self._steps} steps: {path} (open it in https://ui.perfetto.dev);"
            " milliseconds per step, share, phase:",
            *(f"{ms / self._steps:12.2f}  {ms / total:4.0%}  {phase}" for phase, ms in ranked),
        ]

    def _close_phase(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, begun: Any, ended: Any) -> float:
        if self._device.type != "cuda":
            return float(1e3 * (ended - begun))
        ended.synchronize()
        return float(begun.elapsed_time(ended))
