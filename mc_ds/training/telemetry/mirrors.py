"""Copies of a run's record in other programs: each may be missing, offline or broken, and the run
goes on.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, SupportsFloat

Values = Mapping[str, SupportsFloat | str | None]


class Sink(Protocol):
    """One program that takes a run's record; whatever it raises ends the copy."""

    def log(self, step: int, values: Mapping[str, SupportsFloat | str]) -> None:
        """Take the record of one step."""
        ...

    def attach(self, file: Path) -> None:
        """Take a page (.html) or a picture (.png) of the run."""
        ...

    def finish(self, exit_code: int) -> None:
        """End; a non-zero `exit_code` is a run that failed."""
        ...


class Mirror:
    """Hands a run's record on to a sink, which `start` opens; None: there is nothing to copy to.

    Any failure, at the start too, ends the copy with one warning.
    """

    def __init__(self, name: str, start: Callable[[], Sink | None]) -> None:
        self._name = name
        self.sink: Sink | None = None
        self._trying(lambda: setattr(self, "sink", start()))

    def write(self, step: int, values: Values) -> None:
        """Copy the record of one step."""
        if (sink := self.sink) is not None:
            known = {key: value for key, value in values.items() if value is not None}
            self._trying(lambda: sink.log(step, known))

    def close(self, folder: Path, *, exit_code: int = 0) -> None:
        """Copy the report and the pictures that the run's folder has by now, and end."""
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
                f"{self._name} mirror is off from here ({reason}); metrics.jsonl is complete",
                stacklevel=3,
            )


def media(folder: Path) -> list[Path]:
    """Return the pages and pictures in a run's folder: its report and focus maps."""
    return sorted(
        file for pattern in ("*.html", "*.png", "figures/*.png") for file in folder.glob(pattern)
    )
