"""The Markdown table of a group, made from the result files of its trials."""

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
    "corr, LOD alone": ("mc/preference_corr_lod_only", "{:+.3f}"),
    "pairs right": ("mc/preference_agreement", "{:.3f}"),
}
"""Metrics of a training: means over the last fifth of LensNet's steps. Each step's value was
computed before LensNet learned from its sequences.
"""
LAST_SHARE = 5


def group_table(name: str, group: Group, rows: Sequence[Row]) -> str:
    """Return the section of a group: its question, its base, the calls that made it, and its
    table.
    """
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
    """Return the METRICS of a finished run by key; those that were never recorded are left out."""
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
    """Return the cells of a row's trainings: facts they share, and means of those in which they
    differ.
    """
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
    """Return the cell "loss / hit rate"; with several seeds, mean ± standard deviation."""
    records = [record for e in evaluations for record in e["records"] if record["policy"] == policy]
    figures = []
    for key in ("horizon_loss", "hit_rate"):
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            figures.append(f"{statistics.fmean(values):.3f}{spread}")
    return " / ".join(figures) or "–"


def _problem(row: Row) -> str:
    """Return why seeds of a row are not finished; empty if all are."""
    problems = []
    for trial, records in row.runs:
        log = log_of(records if trial.trained.exists() else trial.folder)
        if not records.exists():
            problems.append(last_line(log) if log.exists() else "not run")
    return "; ".join(dict.fromkeys(problems))


def _setting(name: str, trials: Sequence[Trial]) -> str:
    """Return a line on the base of a group."""
    config = trials[0].config
    start = config.train.init_from
    weights = f"weights of `{start}`" if start else "trained from the start"
    seeds = dict.fromkeys(str(trial.config.seed) for trial in trials)
    return f"Group `{name}`: `{trials[0].recipe}`, {weights}; seeds {', '.join(seeds)}."


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _escaped(cell: str) -> str:
    """Escape text for a table cell."""
    return " ".join(cell.replace("|", "\\|").split())
