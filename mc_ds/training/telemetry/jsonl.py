"""`metrics.jsonl`: one JSON object per optimizer step, in order of `step`. This file is the
record of a run.
"""

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

    What was written survives this process at once, the machine after `sync`. Opening drops the
    records at or after `start_step` (all of them in a fresh run) and whatever a killed process
    left half-written, so that a resumed run leaves exactly one record per step. Records are
    strict JSON: a value that is not finite is written as null. With `enabled` False, on every
    rank but 0, nothing is opened and nothing is written.
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
        """Appends the record of `step`. Raises ValueError where that step, or a later one, has
        its record already, and OSError where the file cannot be written or no longer bears its
        name.
        """
        if self._file is None:
            return
        if step <= self._last_step:
            raise ValueError(
                f"step = {step} already has its record in {self.path}: the next one is at least"
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
        """Flushes to disk: a checkpoint must not be newer than the record, whatever happens to
        the machine.
        """
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; further writes are an error. Closing twice is fine."""
        if self._file is not None:
            self._file.close()

    def _check_name(self, handle: int) -> None:
        """Raises OSError where the open file is not the one that `path` names: what is written
        to it would be lost.
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
    """Rewrites `path` with its whole records of steps before `start_step`, atomically; nothing
    to do where there is no file.
    """
    if not path.exists():
        return
    with path.open("rb") as old, replace_file(path) as new:
        new.writelines(line for line in old if _step_of(line) < start_step)


def _step_of(line: bytes) -> float:
    """The step of a record's line; infinity for a line that is not a whole record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
    return step if isinstance(step, int) and line.endswith(b"\n") else math.inf


def _plain(value: Any) -> bool | int | float | str | None:
    """A JSON value: Python's own types as they are, numbers of NumPy and torch by value, null
    for what is not finite.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = value.item() if hasattr(value, "item") else float(value)
    return number if math.isfinite(number) else None
