"""What rank 0 says: whole lines on stderr, or above a live view in a terminal; all of them, with
their time, in `train.log` of the run's folder.
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
"""In the run's folder: what the run has said, of all its starts."""
LINE_INTERVAL_S = 10.0
"""Seconds between lines of progress at least; the first one comes with the first pace."""


class Screen:
    """The output of a run of `total_steps`, begun at `start_step` in this process.

    With `shows_progress` False the screen has only what `print` is given, and the log all the
    same its lines of progress. With `enabled` False (every rank but 0) nothing is written. A log
    that cannot be written is said so once.
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
        self._said = -LINE_INTERVAL_S
        """When the last line of progress was written."""

    def print(self, lines: Sequence[str]) -> None:
        """Print lines, and write them to the log."""
        if self._enabled and lines:
            text = "\n".join(lines)
            print(text, file=sys.stderr) if self._view is None else self._view.print(text)
            self.log(lines)

    def log(self, lines: Sequence[str]) -> None:
        """Write lines to the log alone."""
        if self._log is None:
            return
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        text = "".join(f"{now}  {line}\n" for line in "\n".join(lines).splitlines())
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            path, self._log = self._log, None
            self.print([f"warning: {path} is not written from here on: {error.strerror}"])

    def update(self, record: Record) -> None:
        """Take the record of one more step."""
        if not self._enabled:
            return
        self.progress.update(record)
        now = time.monotonic()
        is_due = self.progress.left_s is not None and now - self._said >= LINE_INTERVAL_S
        if is_due or self.progress.step == self.progress.total_steps:
            self._said = now
            self._say(self.progress.line())
        if self._has_view and self._view is None:
            self._view = LiveView(self.progress)
        if self._view is not None:
            self._view.update()

    def close(self) -> None:
        """Leave the view as it is, and say how long a finished run has taken."""
        progress = self.progress
        if self._view is not None:
            self._view.close()
            self._view = None
        if self._enabled and progress.figures and progress.step == progress.total_steps:
            self.print([f"done: step {progress.step}, {duration(progress.elapsed_s)} of training"])

    def _say(self, line: str) -> None:
        """Write a line of progress, to the screen too where there is no view."""
        if self._has_view or not self._shows_progress:
            self.log([line])
        else:
            self.print([line])
