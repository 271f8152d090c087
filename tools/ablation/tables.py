"""Makes the Markdown table of a group from the result files of its trials."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation.commands import last_line
from ablation.plan import Group
from ablation.runner import log_of
from ablation.trials import Row, Trial
from mc_ds.training.planning.work import parameter_counts

METRICS = {
    "lens loss": ("mc/lens_loss", "{:.3f}"),
    "corr": ("mc/preference_corr_mean", "{:+.3f}"),
    "corr, LOD only": ("mc/preference_corr_lod_only", "{:+.3f}"),
    "pairs right": ("mc/preference_agreement", "{:.3f}"),
}
"""Metrics of a training by column, as means over the last fifth of LensNet's steps. Each step's
sequences are new to LensNet when its value is computed.
"""
LAST_SHARE = 5
"""The averages cover 1/LAST_SHARE of LensNet's steps."""


def group_table(name: str, group: Group, rows: Sequence[Row]) -> str:
    """Return a group's section: question, base, the calls that produced the results, and table."""
    evaluated = {
        row.label: [_read(records) for _, records in row.runs if records.exists()] for row in rows
    }
    found = [evaluation for several in evaluated.values() for evaluation in several]
    policies = list(dict.fromkeys(record["policy"] for e in found for record in e["records"]))
    head = ["variant", "sequences", "LensNet", "seconds", *METRICS, *policies]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        problem, done = _problem(row), evaluated[row.label]
        label = f"{row.label} ({problem})" if problem else row.label
        trained = [trial for trial, records in row.runs if records.exists()]
        cells = [*_training_cells(trained), *(_policy_cell(done, policy) for policy in policies)]
        lines.append([label, *(cells if done else [""] * (len(head) - 1))])
    table = "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)
    trials = [trial for row in rows for trial, _ in row.runs]
    calls = [_read(trial.trained)["made"] for trial in trials if trial.trained.exists()]
    made = dict.fromkeys([*calls, *(evaluation["made"] for evaluation in found)])
    parts = [
        f"### {group.question}",
        _setting(name, trials),
        "\n".join(f"* {m}" for m in made),
        table,
    ]
    return "\n\n".join(part for part in parts if part)


def training_metrics(folder: Path) -> dict[str, float]:
    """Return the METRICS of a finished run by column, without those that it never logged."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    learnt = [record for record in records if METRICS["lens loss"][0] in record]
    last = learnt[-max(1, len(learnt) // LAST_SHARE) :]
    figures = {
        name: [record[key] for record in last if record.get(key) is not None]
        for name, (key, _) in METRICS.items()
    }
    return {name: statistics.fmean(values) for name, values in figures.items() if values}


def _training_cells(trials: Sequence[Trial]) -> list[str]:
    """Return the cells about a row's trainings; metrics and seconds are means over seeds."""
    if not trials:
        return []
    config = trials[0].config
    figures = [training_metrics(trial.folder) for trial in trials]
    cells = [
        f"{config.train.total_steps * config.train.global_batch_size:,}",
        f"{parameter_counts(config).get('lensnet', 0) / 1e6:.2f} M",
        f"{statistics.fmean(_read(trial.trained)['seconds'] for trial in trials):.0f}",
    ]
    for name, (_, form) in METRICS.items():
        values = [figure[name] for figure in figures if name in figure]
        cells.append(form.format(statistics.fmean(values)) if values else "–")
    return cells


def _policy_cell(evaluations: Sequence[dict[str, Any]], policy: str) -> str:
    """Return the cell "loss / hit rate", with several seeds each as mean ± standard deviation."""
    records = [record for e in evaluations for record in e["records"] if record["policy"] == policy]
    figures = []
    for key in ("horizon_loss", "hit_rate"):
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            figures.append(f"{statistics.fmean(values):.3f}{spread}")
    return " / ".join(figures) or "–"


def _problem(row: Row) -> str:
    """Return why some seeds of a row are not finished; empty if all are."""
    problems = []
    for trial, records in row.runs:
        log = log_of(records if trial.trained.exists() else trial.folder)
        if not records.exists():
            problems.append(last_line(log) if log.exists() else "not run")
    return "; ".join(dict.fromkeys(problems))


def _setting(name: str, trials: Sequence[Trial]) -> str:
    """Return a line about a group's recipe, initial weights and seeds."""
    config = trials[0].config
    start = config.train.init_from
    weights = f"initial weights `{start}`" if start else "random initial weights"
    seeds = dict.fromkeys(str(trial.config.seed) for trial in trials)
    return f"Group `{name}`: `{trials[0].recipe}`, {weights}; seeds {', '.join(seeds)}."


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _escaped(cell: str) -> str:
    """Escape text for a table cell."""
    return " ".join(cell.replace("|", "\\|").split())
