"""The results as a section of a Markdown page, between markers, so that writing it again replaces it and nothing else. The section is made
from the results in a file beside the page, and from nothing else.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ablation.jobs import State
from ablation.results import (
    EvaluationResult,
    GroupEntry,
    Provenance,
    Results,
    RowEntry,
    TrialResult,
)
from mc_ds.config import ConfigError
from mc_ds.storage import replace_text

BEGIN = "<!-- ablations: begin (written by tools/ablate.py, which replaces all up to the end) -->"
END = "<!-- ablations: end -->"
RESULTS = "ablations.json"
"""Name of the file beside the page."""
LEGEND = (
    "A row is a training on the same frozen backbone and GistNet, unless its group says otherwise, and an evaluation on sequences that "
    "are the same for all rows and were in no training. *sequences*: all training sequences of the run, those in which LensNet rests "
    "among them. *LensNet*: its parameters. *lens loss*, *corr* (its control, a score of the LOD "
    "alone), *pairs right*: means over the last fifth of LensNet's steps, of sequences it had not learnt from. Policies: loss of the "
    "answers in nats / share of the asked facts at LOD0; `blind` and `other_question` are controls. *seconds*: the training command, "
    "start included, beside the others that ran at the time. With several seeds: their mean, and ± their standard deviation. Each group "
    "names the calls that gave its figures, and which rows where there are several. All this is written by `tools/ablate.py` from "
    f"[{RESULTS}]({RESULTS}), where it puts what it finds, row by row."
)

Pair = tuple[TrialResult, EvaluationResult | None]
"""A row's training and evaluation, of one seed."""


def section(results: Results) -> str:
    """The section's Markdown, markers included. Groups of which nothing has run are left out. Raises ConfigError where nothing has."""
    names = shown(results)
    if not names:
        raise ConfigError("no variant has been run yet: there is nothing to write")
    return (
        "\n\n".join(
            [BEGIN, "## Ablations", LEGEND, *(group_section(results, name) for name in names), END]
        )
        + "\n"
    )


def shown(results: Results) -> list[str]:
    """Names of the groups of which something has run, in order."""
    return [
        name
        for name in results.order
        if name in results.groups and _trials(results, results.groups[name])
    ]


def group_section(results: Results, name: str) -> str:
    """The part of a group: its question, what it is a variation of, the calls behind it, and its table."""
    group = results.groups[name]
    return "\n\n".join(
        [
            f"### {group.question}",
            _setting(results, name),
            _calls(results, group),
            group_table(results, group),
        ]
    )


def results_beside(page: Path) -> Path:
    """The file that the section of `page` is made from. Raises ConfigError where it could not be written, or tables would be lost."""
    if page.is_dir() or not page.parent.is_dir() or not os.access(page.parent, os.W_OK):
        raise ConfigError(
            f"--docs {page}: give a file, in a folder that exists and can be written to"
        )
    path = page.with_name(RESULTS)
    _, old, _ = _split(page)
    if old.strip() and not path.exists():
        raise ConfigError(
            f"{page} has tables, but {path}, which they are made from, does not exist: restore it, or remove the tables"
        )
    return path


def write_section(page: Path, text: str) -> None:
    """Replaces what lies between the markers of `page`, or appends it where there are none. Raises ConfigError for markers out of order."""
    before, _, after = _split(page)
    replace_text(page, before + text.rstrip("\n") + after)


def _split(page: Path) -> tuple[str, str, str]:
    """What stands before the section, between its markers, and behind it. Raises ConfigError for markers out of order."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = old.find(BEGIN), old.find(END)
    if (begin < 0) != (end < 0) or end < begin or old.count(BEGIN) > 1 or old.count(END) > 1:
        raise ConfigError(
            f"{page} must hold the markers {BEGIN!r} and {END!r} once each, in this order, or neither"
        )
    if begin < 0:
        return f"{old.rstrip()}\n\n".lstrip(), "", "\n"
    return old[:begin], old[begin + len(BEGIN) : end], old[end + len(END) :]


def group_table(results: Results, group: GroupEntry) -> str:
    """The Markdown table of a group."""
    pairs = {row.label: _pairs(results, row) for row in group.rows}
    policies = list(
        dict.fromkeys(
            record["policy"]
            for found in pairs.values()
            for _, e in found
            if e
            for record in e.records
        )
    )
    head = [
        "variant",
        "sequences",
        "LensNet",
        "seconds",
        "lens loss",
        "corr (control)",
        "pairs right",
        *policies,
    ]
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
        records = [
            record for _, e in pairs if e for record in e.records if record["policy"] == policy
        ]
        loss, hits = (
            _spread([r[key] for r in records if r.get(key) is not None])
            for key in ("horizon_loss", "hit_rate")
        )
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
    return (
        trial.state is State.FINISHED
        and evaluation is not None
        and evaluation.state is State.FINISHED
    )


def _problem(row: RowEntry, pairs: Sequence[Pair]) -> str:
    """What kept seeds of a row from being finished; empty where nothing did."""
    problems = []
    for trial, evaluation in pairs:
        if trial.state is not State.FINISHED:
            problems.append(f"training {trial.state} {trial.reason}")
        elif evaluation is not None and evaluation.state is not State.FINISHED:
            problems.append(f"evaluation {evaluation.state} {evaluation.reason}")
    open_seeds = len(row.trials) - sum(
        evaluation is not None or trial.state is not State.FINISHED for trial, evaluation in pairs
    )
    if open_seeds:
        problems.append(
            "not run"
            if open_seeds == len(row.trials)
            else f"{open_seeds} of {len(row.trials)} seeds not run"
        )
    return "; ".join(dict.fromkeys(problem.strip() for problem in problems))


def _trials(results: Results, group: GroupEntry) -> list[TrialResult]:
    """All trainings of a group that have ended."""
    return [trial for row in group.rows for trial, _ in _pairs(results, row)]


def _setting(results: Results, name: str) -> str:
    """One line on what a group is a variation of."""
    pairs = [pair for row in results.groups[name].rows for pair in _pairs(results, row)]
    starts = _distinct(pairs, lambda pair: f"`{pair[0].recipe}`, {_weights(pair[0])}")
    seeds = sorted({trial.seed for trial, _ in pairs})
    counts = _distinct(
        [e.records[0] for _, e in pairs if e and e.records],
        lambda record: f"{record['n']} sequences of `{record['task']}`",
    )
    evaluated = f", {' or '.join(counts)}" if counts else ""
    return f"Group `{name}`: {' or '.join(starts)}; seeds {', '.join(map(str, seeds))}{evaluated}."


def _weights(trial: TrialResult) -> str:
    """What a training started from."""
    return f"weights of `{trial.init_from}`" if trial.init_from else "trained from the start"


def _calls(results: Results, group: GroupEntry) -> str:
    """A line for each call that gave figures of a group: what it ran on, and, where there are several, its rows."""
    rows: dict[str, list[str]] = {}
    for row in group.rows:
        for trial, evaluation in _pairs(results, row):
            for made in (trial.made, evaluation.made if evaluation else None):
                if made is not None:
                    rows.setdefault(_call(made), []).append(f"*{row.label}*")
    if len(rows) == 1:
        return f"* {next(iter(rows))}"
    return "\n".join(
        f"* {call} Rows: {', '.join(dict.fromkeys(labels))}." for call, labels in rows.items()
    )


def _call(made: Provenance) -> str:
    """One call in one line."""
    jobs = f"{made.jobs} command{'s' if made.jobs > 1 else ''} at a time"
    return f"`{made.command}`: {made.hardware}; {made.versions}; commit: {made.commit}; {made.date}; {jobs}."


def _distinct(items: Sequence[Any], of: Callable[[Any], str]) -> list[str]:
    """What `of` says of the items, each answer once, in order."""
    return list(dict.fromkeys(of(item) for item in items))


def _escaped(cell: str) -> str:
    """Text that cannot end a cell or a row."""
    return " ".join(cell.replace("|", "\\|").split())
