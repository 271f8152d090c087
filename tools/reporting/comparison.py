"""Compares two runs: different settings, metrics at their last common step, and paired differences
of evaluations on the same sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reporting.evaluations import Evaluation
from reporting.runs import RECENT, Run, Series
from reporting.statistics import Difference, paired

AVERAGED = (
    "train/loss",
    "mc/lens_loss",
    "mc/preference_corr_mean",
    "mc/preference_corr_lod_only",
    "mc/horizon_spread",
    "train/tokens_per_s",
    "train/step_ms",
    "train/data_wait_ms",
    "train/peak_memory_gb",
)
"""Metrics compared as means over steps; validation metrics are compared at one step."""
LEFT_OUT = ("name", "out_dir", "resume")
"""Settings that are not compared, because they always differ."""


@dataclass(frozen=True)
class Row:
    """A metric of two runs."""

    key: str
    ours: float
    theirs: float
    how: str
    """The step of the values, or how many steps they are averaged over."""

    @property
    def difference(self) -> float:
        """`ours` - `theirs`."""
        return self.ours - self.theirs


@dataclass(frozen=True)
class PairedRow:
    """The loss of one policy in two runs, on the same sequences."""

    task: str
    policy: str
    wc_length: int
    ours: float
    theirs: float
    difference: Difference


def settings_that_differ(ours: Run, theirs: Run) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, our value, their value) of each setting that differs. A missing value is
    None.
    """
    one, two = _flat(ours.config), _flat(theirs.config)
    paths = sorted((one.keys() | two.keys()) - set(LEFT_OUT))
    return [(p, one.get(p), two.get(p)) for p in paths if one.get(p) != two.get(p)]


def _flat(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def figures(ours: Run, theirs: Run) -> list[Row]:
    """Return the metrics that both runs have, up to the last step that both have reached."""
    last = min(ours.last_step, theirs.last_step)
    validated = [key for key in ours.keys if key.startswith("val/") and key != "val/lensnet_calls"]
    rows = []
    for key in (*validated, *AVERAGED):
        pair = [[point for point in run.series(key) if point[0] <= last] for run in (ours, theirs)]
        if all(pair):
            rows.append(_row(key, *pair))
    return rows


def _row(key: str, ours: Series, theirs: Series) -> Row:
    if key in AVERAGED:
        count = min(RECENT, len(ours), len(theirs))
        one, two = (sum(value for _, value in points[-count:]) / count for points in (ours, theirs))
        return Row(key, one, two, f"mean of the last {count}")
    steps = {step for step, _ in ours} & {step for step, _ in theirs}
    if steps:
        step = max(steps)
        return Row(key, dict(ours)[step], dict(theirs)[step], f"step {step}")
    return Row(key, ours[-1][1], theirs[-1][1], f"steps {ours[-1][0]} and {theirs[-1][0]}")


def evaluated(ours: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> list[PairedRow]:
    """Return the losses that both runs have in files of the same name and on the same sequences."""
    other = {evaluation.path.name: _by_cell(evaluation) for evaluation in theirs}
    rows = []
    for evaluation in ours:
        for cell, record in _by_cell(evaluation).items():
            match = other.get(evaluation.path.name, {}).get(cell)
            if match is not None and match["ids"] == record["ids"]:
                rows.append(
                    PairedRow(
                        record["task"],
                        record["policy"],
                        record["wc_length"],
                        record["horizon_loss"],
                        match["horizon_loss"],
                        paired(record["losses"], match["losses"]),
                    )
                )
    return rows


def _by_cell(evaluation: Evaluation) -> dict[tuple[Any, ...], dict[str, Any]]:
    names = ("task", "policy", "seq_len", "wc_length")
    return {tuple(record[name] for name in names): record for record in evaluation.records}


def as_text(ours: Run, theirs: Run, rows: Sequence[PairedRow] = ()) -> list[str]:
    """Return the comparison as lines of text."""
    lines = [f"{ours.folder} ({ours.last_step} steps) against {theirs.folder} ({theirs.last_step})"]
    changed = settings_that_differ(ours, theirs)
    lines += [f"  {path:<38}{one} <- {two}" for path, one, two in changed]
    lines += [f"  {'':<30}{'ours':>12}{'theirs':>12}{'difference':>12}"]
    lines += [
        f"  {row.key:<30}{row.ours:>12,.4g}{row.theirs:>12,.4g}{row.difference:>+12,.3g}  {row.how}"
        for row in figures(ours, theirs)
    ]
    lines += [
        f"  {f'{row.task}, {row.policy}':<30}{row.ours:>12.4f}{row.theirs:>12.4f}"
        f"{row.difference.mean:>+12.4f}  ± {row.difference.stderr or 0:.4f}, {row.difference.n}"
        f" sequences: {row.difference.certainty}"
        for row in rows
    ]
    return lines
