"""Summarises a run: prints key metrics from its `metrics.jsonl`, and plots its curves to
`metrics.png` in the run's folder. Given two runs, compares them.

Usage: python tools/summarize_run.py runs/demo
       python tools/summarize_run.py runs/demo runs/other
"""

import argparse
import sys
from pathlib import Path

from reporting.charts import charts_of
from reporting.comparison import as_text, evaluated
from reporting.evaluations import read_evaluations
from reporting.pictures import save_picture
from reporting.runs import RECENT, Run, Series, open_run

from mc_ds.console import HelpFormatter, run_program


def change(points: Series, unit: str = "") -> str:
    """Return a phrase with first value, last value and the decrease between them."""
    (first_step, first), (last_step, last) = points[0], points[-1]
    return (
        f"{first:.4f} (step {first_step}) -> {last:.4f} (step {last_step}), fell by"
        f" {first - last:.4f}{unit}"
    )


def summary(run: Run) -> list[str]:
    """Return one line for each key metric that the run has."""
    lines = [f"steps                         {run.records[0]['step']} .. {run.last_step}"]

    def add(key: str, text: str) -> None:
        lines.append(f"{key:<30}{text}")

    for key in ("val/loss", "val/loss_baseline", "train/loss"):
        if points := run.series(key):
            add(key, change(points, " nats"))
    for key, form in (("train/tokens", "{:,.0f}"), ("mc/lensnet_calls", "{:,.0f}")):
        if points := run.series(key):
            add(key, form.format(points[-1][1]))
    for key in ("train/tokens_per_s", "train/step_ms", "train/data_wait_ms"):
        if points := run.series(key):
            add(key, f"{run.recent(key):,.1f} (mean of the last {len(points[-RECENT:])})")
    if points := run.series("mc/lens_loss"):
        add("mc/lens_loss", change(points))
    for key in ("mc/preference_corr_mean", "mc/preference_corr_lod_only"):
        if points := run.series(key):
            add(key, f"{run.recent(key):+.3f} (mean of the last {len(points[-RECENT:])})")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the summary of a run, or the comparison of two; return 2 if one cannot be read."""
    parser = argparse.ArgumentParser(
        description="Summarize a training run, or compare two.", formatter_class=HelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/demo")
    parser.add_argument("against", type=Path, nargs="?", help="folder of a run to compare it with")
    options = parser.parse_args(arguments)
    try:
        run = open_run(options.run)
        against = None if options.against is None else open_run(options.against)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if against is not None:
        rows = evaluated(read_evaluations(run.folder), read_evaluations(against.folder))
        print("\n".join(as_text(run, against, rows)))
        return 0
    print("\n".join([f"Results of {run.folder}", *(f"  {line}" for line in summary(run))]))
    print(f"  {'all metrics':<30}{run.folder / 'metrics.jsonl'}")
    if charts := charts_of(run):
        save_picture(charts, run.folder / "metrics.png")
        print(f"  {'curves':<30}{run.folder / 'metrics.png'}")
    return 0


if __name__ == "__main__":
    run_program(main)
