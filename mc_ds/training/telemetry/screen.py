"""Rank 0's output: lines on stderr, or above the live view in a terminal. `train.log` in the run's
folder has all of them, with times.
"""

import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from mc_ds.training.telemetry.live import LiveView
from mc_ds.training.telemetry.progress import Progress, Record, duration

LOG = "train.log"
"""Log file in the run's folder; resumed runs append to it."""
LINE_INTERVAL_S = 10.0
"""Minimum seconds between progress lines. The first one follows the second step."""


class Screen:
    """Screen and log of a run of `total_steps`, resumed at `start_step`.

    With `shows_progress` False, progress lines go only to the log. With `enabled` False (ranks
    other than 0) nothing is written. If the log cannot be written, one warning is printed.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        start_step: int = 0,
        enabled: bool = True,
        shows_progress: bool = True,
    ) -> None:
        self.progress = Progress(total_steps, start_step=start_step)
        self._enabled, self._shows_progress = enabled, shows_progress
        self._log: Path | None = folder / LOG if enabled else None
        is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._has_view = enabled and shows_progress and is_terminal
        self._view: LiveView | None = None
        self._last_line = -LINE_INTERVAL_S
        """Time of the last progress line."""

    def print(self, lines: Sequence[str]) -> None:
        """Print lines, and write them to the log."""
        if self._enabled and lines:
            text = "\n".join(lines)
            print(text, file=sys.stderr) if self._view is None else self._view.print(text)
            self.log(lines)

    def log(self, lines: Sequence[str]) -> None:
        """Write lines to the log only."""
        if self._log is None:
            return
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        text = "".join(f"{now}  {line}\n" for line in "\n".join(lines).splitlines())
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            path, self._log = self._log, None
            self.print(
                [f"warning: cannot write {path} ({error.strerror}): the run continues without it"]
            )

    def update(self, record: Record) -> None:
        """Show the record of the next step."""
        if not self._enabled:
            return
        self.progress.update(record)
        now = time.monotonic()
        is_due = self.progress.left_s is not None and now - self._last_line >= LINE_INTERVAL_S
        if is_due or self.progress.step == self.progress.total_steps:
            self._last_line = now
            self._write_progress(self.progress.line())
        if self._has_view and self._view is None:
            self._view = LiveView(self.progress)
        if self._view is not None:
            self._view.update()

    def close(self) -> None:
        """Close the view, which stays visible, and print how long a finished run took."""
        progress = self.progress
        if self._view is not None:
            self._view.close()
            self._view = None
        if self._enabled and progress.figures and progress.step == progress.total_steps:
            self.print([f"done: step {progress.step}, {duration(progress.elapsed_s)} of training"])

    def _write_progress(self, line: str) -> None:
        """Write a progress line to the log, and without a live view also to the screen."""
        if self._has_view or not self._shows_progress:
            self.log([line])
        else:
            self.print([line])
