"""The progress of a run: its most important metrics, and the time left."""

import math
import time
from collections.abc import Callable, Mapping
from typing import SupportsFloat

Record = Mapping[str, SupportsFloat | str | None]

KEY_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "train/loss", "{:.3f}".format),
    ("val", "val/loss", "{:.3f}".format),
    ("corr", "mc/preference_corr_mean", "{:+.2f}".format),
    ("tok/s", "train/tokens_per_s", "{:,.0f}".format),
    ("MFU", "train/mfu", "{:.1%}".format),
    ("GB", "train/peak_memory_gb", "{:.1f}".format),
)
"""Label, metric and format of each figure shown. A step without the metric shows its last value."""
ZERO_IS_NONE = frozenset({"train/peak_memory_gb"})
"""Metrics that are not shown if 0 (there is no GPU)."""


class Progress:
    """Tracks the progress of a run of `total_steps`, resumed at `start_step`.

    `clock` returns seconds. The time left is estimated from this process's steps after the first
    one, which compiles; the time of validations and checkpoints is included.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps, self.step, self._clock = total_steps, start_step, clock
        self.figures: dict[str, str] = {}
        self.saved: int | None = None
        """Step of the last checkpoint saved by this process; None before the first."""
        self._begun = clock()
        self._first: tuple[int, float] | None = None
        self._now = self._begun

    def update(self, record: Record) -> None:
        """Add the record of the next step."""
        self.step += 1
        self._now = self._clock()
        if self._first is None:
            self._first = (self.step, self._now)
        for label, key, form in KEY_FIGURES:
            value = _finite(record.get(key))
            if value is not None and (value or key not in ZERO_IS_NONE):
                self.figures[label] = form(value)
        epochs = [_finite(record[key]) for key in record if key.split("/")[:2] == ["data", "epoch"]]
        known = [value for value in epochs if value is not None]
        if known:
            self.figures["epoch"] = f"{max(known):.2f}"
        labels = [label for label, *_ in KEY_FIGURES]
        self.figures = {
            label: self.figures[label] for label in [*labels, "epoch"] if label in self.figures
        }

    @property
    def elapsed_s(self) -> float:
        """Seconds between the start of this process's training and the last step."""
        return self._now - self._begun

    @property
    def left_s(self) -> float | None:
        """Estimated seconds until the run's last step; None before the second step."""
        if self._first is None or self.step <= self._first[0]:
            return None
        step, since = self._first
        return (self._now - since) / (self.step - step) * (self.total_steps - self.step)

    def line(self) -> str:
        """Return one line with step, metrics and time left."""
        share = self.step / self.total_steps
        parts = [f"step {self.step}/{self.total_steps} ({share:.0%})"]
        parts += [f"{label} {value}" for label, value in self.figures.items()]
        if self.left_s is not None:
            parts.append(f"left {duration(self.left_s)}")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: `3 min 20 s`."""
    whole = round(seconds)
    for unit, size, below, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {below}"
    return f"{whole} s"


def _finite(value: SupportsFloat | str | None) -> float | None:
    if value is None or isinstance(value, str):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
