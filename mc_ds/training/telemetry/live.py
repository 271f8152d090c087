"""The live view of rank 0 in a terminal: bar, figures of the last step, last checkpoint."""

import time
from typing import Any

from mc_ds.training.telemetry.progress import Progress, duration

REDRAW_S = 0.1
"""Seconds between redraws at least."""


class LiveView:
    """Draws a run's progress below its other output.

    It draws from `update` alone: no thread, so that a fork finds no lock held. What others print
    to stdout and stderr meanwhile appears above it.
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
        # A process that is killed leaves the cursor as it is.
        self._live.console.show_cursor(True)

    def update(self) -> None:
        """Draw anew where the last drawing is old enough."""
        now = time.monotonic()
        if now - self._drawn >= REDRAW_S:
            self._drawn = now
            self._draw()

    def print(self, text: str) -> None:
        """Print `text` above the view."""
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last drawing on screen."""
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._live.update(_drawing(self._progress), refresh=True)


def _drawing(progress: Progress) -> Any:
    """Return the view as something that rich draws."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    left = "?" if progress.left_s is None else duration(progress.left_s)
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(f"step {progress.step}/{progress.total_steps}", style="bold"),
        ProgressBar(total=progress.total_steps, completed=progress.step, width=30),
        Text(f"{duration(progress.elapsed_s)} gone, {left} left"),
    )
    figures = Text()
    for label, value in progress.figures.items():
        figures.append(f"{label} ", style="dim").append(f"{value}  ")
    saved = "none yet" if progress.saved is None else f"step {progress.saved}"
    figures.append("checkpoint ", style="dim").append(saved)
    return Group(head, figures)
