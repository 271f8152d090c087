"""What lies in the folder of a run: its records, its settings, its evaluations."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]
Series = list[tuple[int, float]]
RECENT = 20
"""Last values that a mean is taken over."""


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    folder: Path
    records: list[Record]
    """In the order of steps."""
    config: dict[str, Any]
    """What config.yaml says; empty where there is none."""

    @property
    def name(self) -> str:
        """Its name by its settings, else that of its folder."""
        return str(self.config.get("name", self.folder.resolve().name))

    @property
    def last_step(self) -> int:
        """Optimizer steps done."""
        return int(self.records[-1]["step"])

    def series(self, key: str) -> Series:
        """Return (step, value) of every record with a finite value of `key`."""
        points = ((record["step"], record.get(key)) for record in self.records)
        return [
            (step, float(value))
            for step, value in points
            if isinstance(value, int | float) and math.isfinite(value)
        ]

    def last(self, key: str) -> float | None:
        """Return the newest value of `key`; None where there is none."""
        points = self.series(key)
        return points[-1][1] if points else None

    def recent(self, key: str) -> float | None:
        """Return the mean of the last `RECENT` values of `key`; None where there is none."""
        values = [value for _, value in self.series(key)[-RECENT:]]
        return sum(values) / len(values) if values else None

    @property
    def keys(self) -> list[str]:
        """All metric keys of its records, sorted."""
        return sorted({key for record in self.records for key in record} - {"step"})

    def setting(self, path: str) -> Any:
        """Return the setting of a dotted path; None where config.yaml has none."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def open_run(folder: Path) -> Run:
    """Return the run in `folder`. Raises ValueError as `read_records` does, and for settings that
    are no YAML.
    """
    records, path = read_records(folder), folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return Run(folder, records, config if isinstance(config, dict) else {})


def read_records(run: Path) -> list[Record]:
    """Return all records of a run, in the order of steps; of a step that was run twice (after a
    resume) the later record counts.

    Raises ValueError where the file is missing, empty or damaged. A last line cut short, by a
    run that still writes or was killed, is left out.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of a run, e.g. runs/demo")
    lines = path.read_text().splitlines()
    records: dict[int, Record] = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            step = int(record.get("step", number))
        except (ValueError, AttributeError):
            if number == len(lines) - 1:
                break
            raise ValueError(
                f"{path}, line {number + 1}: {line[:60]!r} is not a record of metrics"
            ) from None
        records[step] = {**records.get(step, {}), **record}
    if not records:
        raise ValueError(f"{path} holds no records: the run stopped before its first step")
    return [{**records[step], "step": step} for step in sorted(records)]
