"""Write the results of an evaluation as a table, JSON records and plots."""

import json
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Literal, Protocol

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from mc_ds.evaluation.records import Record
from mc_ds.focus.policies import POLICIES, Access
from mc_ds.storage import replace_text

COLUMNS = (
    ("task", 18, "{}"),
    ("policy", 15, "{}"),
    ("budget", 7, "{:.3g}"),
    ("wc_length", 10, "{}"),
    ("seq_len", 8, "{}"),
    ("horizon_loss", 13, "{:.4f}"),
    ("stderr", 8, "{:.4f}"),
    ("accuracy", 9, "{:.3f}"),
    ("hit_rate", 9, "{:.3f}"),
    ("distractor_rate", 16, "{:.3f}"),
    ("n", 5, "{}"),
)


Axis = Literal["budget", "seq_len"]
BOUNDS = dict(
    zip(
        (name for name, spec in POLICIES.items() if spec.fixed_length is not None),
        cycle((":", "--", "-.")),
    )
)
"""Policies that ignore the budget, with their line styles."""


def table(records: Sequence[Record]) -> str:
    """Return a header and one line per record, with a dash for figures that a task does not have.
    Columns for queries and hops appear where a record has them.
    """
    columns = list(COLUMNS)
    if any(record.query_tokens for record in records):
        columns.insert(2, ("query_tokens", 13, "{}"))
    if any(record.hit_rates_by_hop for record in records):
        columns.insert(
            [name for name, _, _ in columns].index("distractor_rate"),
            ("hit_rates_by_hop", 18, "{}"),
        )
    lines = ["".join(f"{name:>{width}}" for name, width, _ in columns)]
    for record in records:
        values = asdict(record)
        if record.hit_rates_by_hop is not None:
            values["hit_rates_by_hop"] = " ".join(f"{rate:.3f}" for rate in record.hit_rates_by_hop)
        lines.append(
            "".join(
                f"{'-' if values[name] is None else form.format(values[name]):>{width}}"
                for name, width, form in columns
            )
        )
    return "\n".join(lines)


def access_lines(policies: Iterable[str]) -> list[str]:
    """Return one line per kind of access, with the policies of a table that have it."""
    by_access: dict[Access, list[str]] = {}
    for name in dict.fromkeys(policies):
        by_access.setdefault(POLICIES[name].access, []).append(name)
    return [
        f"policies that read {access.value}: {', '.join(names)}"
        for access, names in by_access.items()
    ]


class Chosen(Protocol):
    """A record of any kind of measurement."""

    @property
    def policy(self) -> str:
        """Name of the policy."""

    @property
    def settings(self) -> dict[str, float]:
        """See `PolicySpec.settings`."""


def settings_lines(records: Iterable[Chosen]) -> list[str]:
    """Return a line for each policy whose choice of blocks has settings to name."""
    given = {record.policy: record.settings for record in records if record.settings}
    return [
        f"{policy} chooses blocks with "
        + ", ".join(f"{name} {value:g}" for name, value in settings.items())
        for policy, settings in given.items()
    ]


def best_query_lines(records: Sequence[Record]) -> list[str]:
    """Return a line for each policy and context length at which several query lengths were
    measured, naming the best one.
    """
    cells: dict[Hashable, list[Record]] = {}
    for record in records:
        cells.setdefault(_cell(record), []).append(record)
    return [
        f"{best.task}, {best.wc_length} entries for {best.seq_len} tokens: the best query of "
        f"{best.policy} is the last {best.query_tokens} tokens (of "
        f"{', '.join(str(record.query_tokens) for record in cells[_cell(best)])})"
        for best in best_queries(records)
        if len(cells[_cell(best)]) > 1
    ]


def best_queries(records: Sequence[Record]) -> list[Record]:
    """Return the records, of each retrieval policy only those of its best query length."""
    best: dict[Hashable, Record] = {}
    for record in records:
        cell = _cell(record)
        if cell not in best or record.horizon_loss < best[cell].horizon_loss:
            best[cell] = record
    kept = {id(record) for record in best.values()}
    return [record for record in records if id(record) in kept]


def _cell(record: Record) -> Hashable:
    """Return a key that is equal for records that differ in their query length only."""
    return record.task, record.policy, record.budget, record.wc_length, record.seq_len


def lens_ratio_lines(records: Sequence[Record]) -> list[str]:
    """Return one line per task and length: the ratios of the loss under `lens` to the loss under
    each other policy of equal length.
    """
    records, lines = best_queries(records), []
    for lens in records:
        if lens.policy != "lens":
            continue
        cell = (lens.task, lens.budget, lens.wc_length, lens.seq_len)
        ratios = [
            f"{lens.horizon_loss / other.horizon_loss:.3g}x {other.policy}"
            for other in records
            if (other.task, other.budget, other.wc_length, other.seq_len) == cell
            and other is not lens
            and other.horizon_loss > 0
            and math.isfinite(lens.horizon_loss / other.horizon_loss)
        ]
        if ratios:
            lines.append(
                f"{lens.task}, {lens.wc_length} entries for {lens.seq_len} tokens: the loss under "
                f"lens is {', '.join(ratios)}"
            )
    return lines


def save_records(records: Sequence[Record], path: Path) -> None:
    """Write the records as JSON, with the losses of every sequence. Overwrites an existing file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps([asdict(record) for record in records], indent=1) + "\n")


def save_plots(records: Sequence[Record], stem: Path) -> list[Path]:
    """Plot loss against budget, and against history length if several were evaluated. Of several
    query lengths of a policy, the best is plotted. Return the paths of the PNGs.
    """
    records = best_queries(records)
    paths = [
        _plot(
            records,
            stem.with_name(f"{stem.name}_budget.png"),
            "budget",
            "budget (share of the history)",
        )
    ]
    if len({record.seq_len for record in records}) > 1:
        paths.append(
            _plot(
                records, stem.with_name(f"{stem.name}_history.png"), "seq_len", "history (tokens)"
            )
        )
    return paths


def series(records: Sequence[Record], axis: Axis) -> dict[str, list[Record]]:
    """Return the lines of a plot against `axis` by name: each a list of records that differ only in
    `axis`, sorted by it.

    The name is the policy, followed by the line's history length (on a `seq_len` axis: by its
    budget) if several were evaluated.
    """

    def value(record: Record) -> str:
        """Return the text that distinguishes lines of one policy: the history length, or on a
        `seq_len` axis the budget (empty for a policy without one).
        """
        if axis == "budget":
            return f", {record.seq_len} tokens"
        return "" if record.policy in BOUNDS else f", {record.budget:.3g}"

    several = len({value(record) for record in records} - {""}) > 1
    lines: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: getattr(record, axis)):
        lines.setdefault(record.policy + (value(record) if several else ""), []).append(record)
    names = list(dict.fromkeys(record.policy for record in records))
    return dict(sorted(lines.items(), key=lambda line: names.index(line[1][0].policy)))


def _plot(records: Sequence[Record], path: Path, axis: Axis, label: str) -> Path:
    """Draw one panel per task with a line for each series: horizon loss with its standard error
    against `axis`. On a budget axis, policies without a budget are horizontal lines.
    """
    tasks = list(dict.fromkeys(record.task for record in records))
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        for name, line in series(
            [record for record in records if record.task == task], axis
        ).items():
            loss = [record.horizon_loss for record in line]
            if line[0].policy in BOUNDS and axis == "budget":
                panel.axhline(loss[0], color="gray", linestyle=BOUNDS[line[0].policy], label=name)
            else:
                error = [record.stderr or 0.0 for record in line]
                panel.errorbar(
                    [getattr(record, axis) for record in line],
                    loss,
                    yerr=error,
                    marker="o",
                    capsize=3,
                    label=name,
                )
        panel.set(title=task, xlabel=label, ylabel="loss on the horizon (nats per token)")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
