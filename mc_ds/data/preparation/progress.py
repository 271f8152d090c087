"""Shows the progress of a preparation: a bar on a terminal, else a line every ten seconds."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_EVERY_S = 10.0
"""Seconds between lines without a terminal."""


class Progress:
    """Shows bytes read of `total` (0: unknown), MB/s and the time left."""

    def __init__(self, total: int, report: Callable[[str], None]) -> None:
        self._total, self._report = total, report
        self._started = self._reported = time.monotonic()
        self._bar = tqdm(total=total or None, unit="B", unit_scale=True, disable=None)
        self._done = 0

    def update(self, done: int) -> None:
        """Set the total number of bytes read so far."""
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self._reported >= LINE_EVERY_S:
            self._reported = now
            self._report(self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """Return the progress line; `seconds` have elapsed since the start."""
        rate = self._done / seconds
        line = f"data: {self._done / 1e6:,.1f} MB, {rate / 1e6:,.2f} MB/s"
        if not self._total or not rate:
            return line
        minutes, seconds_left = divmod(round(max(0, self._total - self._done) / rate), 60)
        share = self._done / self._total
        return f"{line}, {share:.0%}, {minutes:,} min {seconds_left:02} s left"

    def close(self) -> None:
        """Close the bar, which stays visible."""
        self._bar.close()
