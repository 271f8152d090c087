"""`--profile STEP:N`: a trace of N steps for Perfetto, and their costliest phases in words."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MOST = 10
"""Phases that are named."""


class Profile:
    """Traces steps `first` + 1 to `first` + `steps` of rank 0; without them it only hands marks on.

    Phases are what lies between two marks: on a GPU by events in its stream, so that nothing
    waits, on CPUs by the clock. They stand in the trace too.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        folder: Path,
        device: torch.device,
        mark: Callable[[str], None],
    ) -> None:
        self._first, self._steps = steps or (-1, 0)
        self._folder, self._device, self._handed_on = folder, device, mark
        self._trace: torch.profiler.profile | None = None
        self._open: Any = None
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Take the name of a phase as it begins."""
        self._handed_on(phase)
        if self._trace is not None:
            self._close_phase()
            self._marks.append((phase, self._now()))
            self._open = torch.profiler.record_function(phase)
            self._open.__enter__()

    def between(self, step: int) -> list[str]:
        """Begin or end after `step` steps, where that is due; return what there is to say."""
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
        """Write the trace, and return where it is and what the phases cost."""
        self._handed_on("profile")
        path = self._folder / f"trace_step_{self._first:08d}.json.gz"
        trace.export_chrome_trace(str(path))
        phases: dict[str, float] = {}
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            phases[phase] = phases.get(phase, 0.0) + self._milliseconds(begun, ended)
        total = sum(phases.values()) or 1.0
        ranked = sorted(phases.items(), key=lambda phase: -phase[1])[:MOST]
        return [
            f"profile of {self._steps} steps: {path} (open it in https://ui.perfetto.dev);"
            " milliseconds a step, share, phase:",
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
