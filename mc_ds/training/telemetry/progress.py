"""The progress bar of rank 0: key figures of the run beside tqdm's step count and time left."""

import math
import sys
from collections.abc import Mapping
from typing import SupportsFloat

from tqdm import tqdm

KEY_FIGURES = (
    ("loss", "train/loss", "{:.3f}"),
    ("val", "val/loss", "{:.3f}"),
    ("tok/s", "train/tokens_per_s", "{:,.0f}"),
    ("corr", "mc/preference_corr_mean", "{:+.2f}"),
)
"""Label, metric and format of each figure; a figure keeps its last value until there is a newer
one.
"""

LOG_FILE_INTERVAL_S = 10.0
"""Seconds between redraws where the output is not a terminal and each redraw is another line."""


class ProgressBar:
    """A bar over `total_steps`, begun at `start_step`. With `enabled` False (every rank but 0)
    nothing is drawn.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, enabled: bool = True) -> None:
        self._figures: dict[str, str] = {}
        interval = 0.1 if sys.stderr.isatty() else LOG_FILE_INTERVAL_S
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            disable=not enabled,
            mininterval=interval,
            dynamic_ncols=True,
            unit="step",
            desc="train",
        )

    def update(self, metrics: Mapping[str, SupportsFloat | str | None]) -> None:
        """One more step, with the step's metrics (numbers on the host)."""
        for label, key, form in KEY_FIGURES:
            value = metrics.get(key)
            if value is not None and not isinstance(value, str) and math.isfinite(float(value)):
                self._figures[label] = form.format(float(value))
        self._bar.set_postfix_str(
            " ".join(f"{label}={value}" for label, value in self._figures.items()), refresh=False
        )
        self._bar.update()

    def print(self, text: str) -> None:
        """Prints `text`, above the bar where one is drawn."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the finished bar on screen."""
        self._bar.close()
