"""Reads a run's folder: its metrics and settings."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]
Series = list[tuple[int, float]]
RECENT = 20
"""Number of last values that `Run.recent` averages."""


@dataclass(frozen=True)
class Run:
    """A run's metrics and settings."""

    folder: Path
    records: list[Record]
    """Records of metrics.jsonl, in the order of steps."""
    config: dict[str, Any]
    """Content of config.yaml; empty if it is missing."""

    @property
    def name(self) -> str:
        """The setting `name`, or else the folder's name."""
        return str(self.config.get("name", self.folder.resolve().name))

    @property
    def last_step(self) -> int:
        """Number of optimizer steps done."""
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
        """Return the last finite value of `key`; None if there is none."""
        points = self.series(key)
        return points[-1][1] if points else None

    def recent(self, key: str) -> float | None:
        """Return the mean of the last RECENT finite values of `key`; None if there are none."""
        values = [value for _, value in self.series(key)[-RECENT:]]
        return sum(values) / len(values) if values else None

    @property
    def keys(self) -> list[str]:
        """All metric keys, sorted."""
        return sorted({key for record in self.records for key in record} - {"step"})

    def setting(self, path: str) -> Any:
        """Return a setting by its dotted name; None if config.yaml lacks it."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def open_run(folder: Path) -> Run:
    """Read the run in `folder`. Raises ValueError if metrics.jsonl or config.yaml is invalid."""
    records, path = read_records(folder), folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return Run(folder, records, config if isinstance(config, dict) else {})


def read_records(run: Path) -> list[Record]:
    """Return the records in a run's metrics.jsonl, in the order of steps.

    If a step has several records, later values replace earlier ones. An incomplete last line, of a
    run in progress or a killed one, is ignored. Raises ValueError if the file is missing, empty or
    damaged.
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
        raise ValueError(f"{path} is empty: the run stopped before its first step")
    return [{**records[step], "step": step} for step in sorted(records)]
