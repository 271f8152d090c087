"""The live view in a terminal: progress bar, metrics of the last step, last checkpoint."""

import time
from typing import Any

from mc_ds.training.telemetry.progress import Progress, duration

REDRAW_S = 0.1
"""Minimum seconds between redraws."""


class LiveView:
    """Draws a run's progress below all other output, also that of stdout and stderr.

    Draws only in `update`, not from a thread, whose lock could be held at a fork.
    """

    def __init__(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.live import Live

        self._progress, self._drawn = progress, 0.0
        self._live = Live(
            _drawing(progress),
            console=Console(stderr=True),
            auto_refresh=False,
            vertical_overflow="crop",
        )
        self._live.start()
        # Show the cursor, because a killed process cannot restore it.
        self._live.console.show_cursor(True)

    def update(self) -> None:
        """Redraw, at most once every REDRAW_S seconds."""
        now = time.monotonic()
        if now - self._drawn >= REDRAW_S:
            self._drawn = now
            self._draw()

    def print(self, text: str) -> None:
        """Print `text` above the view."""
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Draw a last time, and leave that on the screen."""
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._live.update(_drawing(self._progress), refresh=True)


def _drawing(progress: Progress) -> Any:
    """Return the view as a rich renderable."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    left = "?" if progress.left_s is None else duration(progress.left_s)
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(f"step {progress.step}/{progress.total_steps}", style="bold"),
        ProgressBar(total=progress.total_steps, completed=progress.step, width=30),
        Text(f"{duration(progress.elapsed_s)} elapsed, {left} left"),
    )
    figures = Text()
    for label, value in progress.figures.items():
        figures.append(f"{label} ", style="dim").append(f"{value}  ")
    saved = "none yet" if progress.saved is None else f"step {progress.saved}"
    figures.append("checkpoint ", style="dim").append(saved)
    return Group(head, figures)
