"""Summarises a run: prints key figures from its `metrics.jsonl`, and draws its curves to
`metrics.png`.

Usage: python tools/summarize_run.py runs/demo
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
# set before pyplot is imported, so that no display is needed
import matplotlib.pyplot as plt

from mc_ds.console import run_program

Record = dict[str, Any]
Series = list[tuple[int, float]]

PANELS: list[tuple[str, list[str]]] = [
    ("next-token loss (nats)", ["train/loss", "val/loss", "val/loss_baseline"]),
    ("LensNet loss", ["mc/lens_loss"]),
    (
        "preference correlation (negative is right)",
        ["mc/preference_corr_mean", "mc/preference_corr_lod_only"],
    ),
]
RECENT = 20
"""Number of records in a recent mean."""


def read_records(run: Path) -> list[Record]:
    """Return all records of a run in the order of steps. Of a step that was run twice, after a
    resume, the later record is taken.

    Raises ValueError where the file is missing, empty or damaged. An incomplete last line, of a run
    that is still writing or was killed, is left out.
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


def series(records: list[Record], key: str) -> Series:
    """Return (step, value) of every record with a finite value of `key`."""
    points = ((record["step"], record.get(key)) for record in records)
    return [
        (step, float(value))
        for step, value in points
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def change(points: Series, unit: str = "") -> str:
    """Describe the first and last value, and the decrease between them."""
    (first_step, first), (last_step, last) = points[0], points[-1]
    return (
        f"{first:.4f} (step {first_step}) -> {last:.4f} (step {last_step}), fell by"
        f" {first - last:.4f}{unit}"
    )


def recent_mean(points: Series) -> float:
    """Return the mean of the last values."""
    values = [value for _, value in points[-RECENT:]]
    return sum(values) / len(values)


def summary(records: list[Record]) -> list[str]:
    """Return a line for each key figure that the run recorded."""
    lines = [f"steps                         {records[0]['step']} .. {records[-1]['step']}"]

    def add(key: str, text: str) -> None:
        lines.append(f"{key:<30}{text}")

    for key in ("val/loss", "val/loss_baseline", "train/loss"):
        if points := series(records, key):
            add(key, change(points, " nats"))
    for key, form in (("train/tokens", "{:,.0f}"), ("mc/lensnet_calls", "{:,.0f}")):
        if points := series(records, key):
            add(key, form.format(points[-1][1]))
    for key in ("train/tokens_per_s", "train/step_ms", "train/data_wait_ms"):
        if points := series(records, key):
            add(key, f"{recent_mean(points):,.1f} (mean of the last {len(points[-RECENT:])})")
    if points := series(records, "mc/lens_loss"):
        add("mc/lens_loss", change(points))
    for key in ("mc/preference_corr_mean", "mc/preference_corr_lod_only"):
        if points := series(records, key):
            add(key, f"{recent_mean(points):+.3f} (mean of the last {len(points[-RECENT:])})")
    return lines


def draw(records: list[Record], path: Path) -> bool:
    """Draw the curves of the metrics that the run recorded; return whether there were any."""
    panels = [
        (title, [(key, points) for key in keys if (points := series(records, key))])
        for title, keys in PANELS
    ]
    panels = [(title, curves) for title, curves in panels if curves]
    if not panels:
        return False
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 3.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (title, curves) in zip(axes[:, 0], panels, strict=True):
        for key, points in curves:
            sparse = len(points) <= 50
            axis.plot(
                *zip(*points, strict=True),
                label=key,
                marker="o" if sparse else None,
                markersize=3,
                linewidth=1.2,
            )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Print the summary of a run's folder; return the exit code, 1 where it cannot be read."""
    parser = argparse.ArgumentParser(description="Summarize a training run.")
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/demo")
    run: Path = parser.parse_args(arguments).run
    try:
        records = read_records(run)
    except ValueError as error:
        print(f"summarize_run: {error}", file=sys.stderr)
        return 1
    print("\n".join([f"Results of {run}", *(f"  {line}" for line in summary(records))]))
    print(f"  {'record':<30}{run / 'metrics.jsonl'}")
    if draw(records, run / "metrics.png"):
        print(f"  {'curves':<30}{run / 'metrics.png'}")
    return 0


if __name__ == "__main__":
    run_program(main)
