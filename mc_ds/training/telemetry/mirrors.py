"""Mirrors of a run's metrics in other programs. If one is missing, offline or fails, the run goes
on.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, SupportsFloat

Values = Mapping[str, SupportsFloat | str | None]


class Sink(Protocol):
    """A program that receives a run's metrics. After an exception it is not called again."""

    def log(self, step: int, values: Mapping[str, SupportsFloat | str]) -> None:
        """Log the metrics of one step."""
        ...

    def attach(self, file: Path) -> None:
        """Add a page (.html) or a picture (.png) to the run."""
        ...

    def finish(self, exit_code: int) -> None:
        """End the run; a non-zero `exit_code` means that it failed."""
        ...


class Mirror:
    """Copies a run's metrics to the sink returned by `start` (None: to nothing).

    Any exception, also in `start`, ends the mirror with one warning.
    """

    def __init__(self, name: str, start: Callable[[], Sink | None]) -> None:
        self._name = name
        self.sink: Sink | None = None
        self._trying(lambda: setattr(self, "sink", start()))

    def write(self, step: int, values: Values) -> None:
        """Log the metrics of one step, without those that are None."""
        if (sink := self.sink) is not None:
            known = {key: value for key, value in values.items() if value is not None}
            self._trying(lambda: sink.log(step, known))

    def close(self, folder: Path, *, exit_code: int = 0) -> None:
        """Attach the pages and pictures in the run's folder, and end the mirror."""
        if (sink := self.sink) is not None:
            for file in media(folder):
                self._trying(lambda file=file: sink.attach(file))  # type: ignore[misc]
            self._trying(lambda: sink.finish(exit_code))
            self.sink = None

    def _trying(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self.sink = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"the {self._name} mirror failed and is off from now on ({reason}); metrics.jsonl"
                " remains complete",
                stacklevel=3,
            )


def media(folder: Path) -> list[Path]:
    """Return the pages and pictures in a run's folder, e.g. its report and focus maps."""
    return sorted(
        file for pattern in ("*.html", "*.png", "figures/*.png") for file in folder.glob(pattern)
    )
