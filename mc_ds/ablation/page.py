"""The results as a section of a Markdown page, between markers, so that writing it again replaces it and nothing else."""

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mc_ds.ablation.jobs import State
from mc_ds.ablation.results import EvaluationResult, GroupEntry, Provenance, Results, RowEntry, TrialResult
from mc_ds.config import ConfigError

BEGIN = "<!-- ablations: begin (written by launch/ablate.py, which replaces all up to the end) -->"
END = "<!-- ablations: end -->"
LEGEND = (
    "A row is a training on the same frozen backbone and GistNet, unless its group says otherwise, and an evaluation on sequences that "
    "are the same for all rows and were in no training. *LensNet*: its parameters. *lens loss*, *corr* (its control, a score of the LOD "
    "alone), *pairs right*: means over the last fifth of LensNet's steps, of sequences it had not learnt from. Policies: loss of the "
    "answers in nats / share of the asked facts at LOD0; `blind` and `other_question` are controls. *seconds*: the training command, "
    "start included, beside the others that ran at the time. With several seeds: their mean, and ± their standard deviation."
)

Pair = tuple[TrialResult, EvaluationResult | None]
"""A row's training and evaluation, of one seed."""


def section(results: Results) -> str:
    """The section's Markdown, markers included. Groups of which nothing has run are left out. Raises ConfigError where nothing has."""
    names = [name for name in results.order if name in results.groups and _has_run(results, results.groups[name])]
    if not names:
        raise ConfigError("no variant has been run yet: there is nothing to write")
    shown = [trial for name in names for trial in _trials(results, results.groups[name])]
    parts = [BEGIN, "## Ablations", LEGEND, _provenance([trial.made for trial in shown])]
    for name in names:
        parts += [f"### {results.groups[name].question}", _setting(name, results), group_table(results, results.groups[name])]
    return "\n\n".join([*parts, END]) + "\n"


def write_section(page: Path, text: str) -> None:
    """Replaces what lies between the markers of `page`, or appends it where there are none. Raises ConfigError for markers out of order."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = old.find(BEGIN), old.find(END)
    if (begin < 0) != (end < 0) or end < begin or old.count(BEGIN) > 1 or old.count(END) > 1:
        raise ConfigError(f"{page} must hold the markers {BEGIN!r} and {END!r} once each, in this order, or neither")
    before, after = (old[:begin], old[end + len(END) :]) if begin >= 0 else (f"{old.rstrip()}\n\n".lstrip(), "\n")
    new = before + text.rstrip("\n") + after
    partial = page.with_name(f"{page.name}.partial")
    partial.write_text(new, encoding="utf-8")
    os.replace(partial, page)


def group_table(results: Results, group: GroupEntry) -> str:
    """The Markdown table of a group."""
    pairs = {row.label: _pairs(results, row) for row in group.rows}
    policies = list(dict.fromkeys(record["policy"] for found in pairs.values() for _, e in found if e for record in e.records))
    head = ["variant", "sequences", "LensNet", "seconds", "lens loss", "corr (control)", "pairs right", *policies]
    lines = [head, ["---"] * len(head)]
    for row in group.rows:
        found = pairs[row.label]
        problem = _problem(row, found)
        if any(_complete(pair) for pair in found):
            label = f"{row.label} ({problem})" if problem else row.label
            lines.append([label, *_figures([pair for pair in found if _complete(pair)], policies)])
        else:
            lines.append([row.label, problem, *[""] * (len(head) - 2)])
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _figures(pairs: Sequence[Pair], policies: Sequence[str]) -> list[str]:
    """The cells of a row behind its label."""
    trained = [trial for trial, _ in pairs]

    def metric(name: str, form: str) -> str:
        values = [trial.metrics[name] for trial in trained if name in trial.metrics]
        return form.format(statistics.fmean(values)) if values else "–"

    control = metric("control", "{:+.3f}")
    cells = [
        f"{trained[0].sequences:,}",
        f"{trained[0].parameters / 1e6:.2f} M",
        f"{statistics.fmean(trial.seconds for trial in trained):.0f}",
        metric("lens_loss", "{:.3f}"),
        f"{metric('corr', '{:+.3f}')} ({control})",
        metric("agreement", "{:.3f}"),
    ]
    for policy in policies:
        records = [record for _, e in pairs if e for record in e.records if record["policy"] == policy]
        loss, hits = (_spread([r[key] for r in records if r.get(key) is not None]) for key in ("horizon_loss", "hit_rate"))
        cells.append(" / ".join(text for text in (loss, hits) if text) or "–")
    return cells


def _spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _pairs(results: Results, row: RowEntry) -> list[Pair]:
    """What has run of a row, by seed."""
    trials = (results.trials.get(key) for key in row.trials.values())
    return [(trial, trial.evaluations.get(row.evaluation)) for trial in trials if trial is not None]


def _complete(pair: Pair) -> bool:
    trial, evaluation = pair
    return trial.state is State.FINISHED and evaluation is not None and evaluation.state is State.FINISHED


def _problem(row: RowEntry, pairs: Sequence[Pair]) -> str:
    """What kept seeds of a row from being finished; empty where nothing did."""
    problems = []
    for trial, evaluation in pairs:
        if trial.state is not State.FINISHED:
            problems.append(f"training {trial.state} {trial.reason}")
        elif evaluation is not None and evaluation.state is not State.FINISHED:
            problems.append(f"evaluation {evaluation.state} {evaluation.reason}")
    open_seeds = len(row.trials) - sum(evaluation is not None or trial.state is not State.FINISHED for trial, evaluation in pairs)
    if open_seeds:
        problems.append("not run" if open_seeds == len(row.trials) else f"{open_seeds} of {len(row.trials)} seeds not run")
    return "; ".join(dict.fromkeys(problem.strip() for problem in problems))


def _has_run(results: Results, group: GroupEntry) -> bool:
    return bool(_trials(results, group))


def _trials(results: Results, group: GroupEntry) -> list[TrialResult]:
    """All trainings of a group that have ended."""
    return [trial for row in group.rows for trial, _ in _pairs(results, row)]


def _setting(name: str, results: Results) -> str:
    """One line on what a group is a variation of."""
    group = results.groups[name]
    pairs = [pair for row in group.rows for pair in _pairs(results, row)]
    seeds = sorted({trial.seed for trial, _ in pairs})
    counts = _distinct([e for _, e in pairs if e and e.records], lambda e: f"{e.records[0]['n']}")
    weights = f"weights of `{group.init_from}`" if group.init_from else "trained from the start"
    evaluated = f", {' or '.join(counts)} sequences of `{group.task}`" if counts else ""
    return f"Group `{name}`: `{group.recipe}`, {weights}; seeds {', '.join(map(str, seeds))}{evaluated}."


def _provenance(made: Sequence[Provenance]) -> str:
    """Commands, hardware, versions and commits behind the figures."""
    commands = "\n".join(f"    {command}" for command in _distinct(made, lambda m: m.command))
    facts = [
        ("Hardware", lambda m: m.hardware),
        ("Versions", lambda m: m.versions),
        ("Commit", lambda m: m.commit),
        ("Date", lambda m: m.date),
        ("Commands at a time", lambda m: str(m.jobs)),
    ]
    lines = [f"* {label}: {'; '.join(_distinct(made, of))}" for label, of in facts]
    return f"{commands}\n\n" + "\n".join(lines)


def _distinct(items: Sequence[Any], of: Callable[[Any], str]) -> list[str]:
    """What `of` says of the items, each answer once, in order."""
    return list(dict.fromkeys(of(item) for item in items))


def _escaped(cell: str) -> str:
    """Text that cannot end a cell or a row."""
    return " ".join(cell.replace("|", "\\|").split())
