"""`metrics.jsonl`: one JSON object per optimizer step, in order of `step`."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from mc_ds.storage import replace_file


class MetricsWriter:
    """Appends one record per step.

    Records survive a crash of this process at once, and one of the machine after `sync`. Opening
    drops records from `start_step` on and incomplete lines of a killed process, so that a resumed
    run has exactly one record per step. Records are strict JSON: non-finite values become null.
    With `enabled` False (ranks other than 0) nothing is opened or written.
    """

    def __init__(self, path: str | Path, *, start_step: int = 0, enabled: bool = True) -> None:
        self.path = Path(path)
        self._last_step = start_step - 1
        self._file = None
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _keep_before(self.path, start_step)
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, SupportsFloat | str | None]) -> None:
        """Append the record of `step`.

        Raises ValueError if this or a later step already has a record, and OSError if the file
        cannot be written or has been moved or removed.
        """
        if self._file is None:
            return
        if step <= self._last_step:
            raise ValueError(
                f"step = {step} already has a record in {self.path}: should be at least"
                f" {self._last_step + 1}"
            )
        record = {
            "step": step,
            **{key: _plain(value) for key, value in metrics.items() if key != "step"},
        }
        self._check_name(self._file.fileno())
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step

    def sync(self) -> None:
        """Sync the file to disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Further writes are an error; closing again is not."""
        if self._file is not None:
            self._file.close()

    def _check_name(self, handle: int) -> None:
        """Raise OSError if the open file is no longer the one at `path`, because then records would
        be lost.
        """
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(
                errno.ESTALE, "it was moved or removed while the run wrote to it", str(self.path)
            )


def _keep_before(path: Path, start_step: int) -> None:
    """Rewrite `path` atomically with only the complete records of steps before `start_step`, if the
    file exists.
    """
    if not path.exists():
        return
    with path.open("rb") as old, replace_file(path) as new:
        new.writelines(line for line in old if _step_of(line) < start_step)


def _step_of(line: bytes) -> float:
    """Return the step of a record; infinity for a line that is not a complete record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
    return step if isinstance(step, int) and line.endswith(b"\n") else math.inf


def _plain(value: Any) -> bool | int | float | str | None:
    """Convert a value for JSON: numbers of NumPy and torch to Python's, non-finite ones to None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = value.item() if hasattr(value, "item") else float(value)
    return number if math.isfinite(number) else None
