"""The charts of a report as data, independent of the drawing library."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reporting.curves import CHARTS, LOSS, STEP_PARTS, ChartSpec
from reporting.evaluations import POLICIES, Evaluation, is_bound
from reporting.runs import Run, Series
from reporting.statistics import chance_band, smoothed, window_of


@dataclass(frozen=True)
class Curve:
    """A metric over steps."""

    key: str
    label: str
    points: Series
    smooth: Series
    """Running mean; the points themselves if there are few."""
    colour: int
    """Index of the colour."""
    against: bool = False
    """True for the other run of a comparison."""


@dataclass(frozen=True)
class Band:
    """A band around 0 over steps."""

    label: str
    half_width: Series


@dataclass(frozen=True)
class Chart:
    """Curves of one unit, with an explanation (`note`)."""

    name: str
    title: str
    note: str
    unit: str
    curves: Sequence[Curve]
    band: Band | None = None
    line: tuple[float, str] | None = None
    """A reference level and its label."""
    stacked: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with its standard error, if known."""

    label: str
    value: float
    error: float | None
    kind: str
    """One of "lens", "rival" and "bound"."""
    about: str = ""
    """Description of the policy."""


@dataclass(frozen=True)
class Bars:
    """Losses of all policies on one task at one length."""

    name: str
    title: str
    note: str
    unit: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Lines:
    """Losses of all policies on one task over several lengths."""

    name: str
    title: str
    note: str
    unit: str
    across: str
    """Label of the x axis."""
    lines: dict[str, list[tuple[float, float, float]]]
    """Points (x, value, standard error) by policy."""


Drawing = Chart | Bars | Lines


def charts_of(run: Run, against: Run | None = None) -> list[Chart]:
    """Return the charts for which the run has metrics."""
    found = [_chart(spec, run, against) for spec in CHARTS]
    charts = [chart for chart in found if chart.curves]
    step_split = _step_split(run)
    return charts + ([step_split] if step_split else [])


def _chart(spec: ChartSpec, run: Run, against: Run | None) -> Chart:
    curves: list[Curve] = []
    for colour, (key, label) in enumerate(spec.keys(run.keys)):
        curves += _curve(run, key, label, colour, spec)
        if against is not None:
            curves += _curve(against, key, f"{label}, {against.name}", colour, spec, against=True)
    band = None
    if spec.chance_of and (points := run.series(spec.chance_of)):
        steps, values = zip(*points, strict=True)
        widths = chance_band(values, window_of(len(values))).tolist()
        band = Band("95 % chance band", list(zip(steps, widths, strict=True)))
    return Chart(spec.name, spec.title, spec.note, spec.unit, curves, band, spec.line)


def _curve(
    run: Run, key: str, label: str, colour: int, spec: ChartSpec, *, against: bool = False
) -> list[Curve]:
    points = run.series(key)
    if spec.baseline:
        base = dict(run.series(spec.baseline))
        points = [(step, value - base[step]) for step, value in points if step in base]
    if not points or (spec.hidden_at_zero and not any(value for _, value in points)):
        return []
    return [Curve(key, label, points, _smooth(points), colour, against)]


def _smooth(points: Series) -> Series:
    steps, values = zip(*points, strict=True)
    return list(zip(steps, smoothed(values, window_of(len(values))).tolist(), strict=True))


def _step_split(run: Run) -> Chart | None:
    """Return a stacked chart of the parts of a step's time; None without such metrics."""
    whole = dict(run.series("train/step_ms"))
    parts = {label: dict(run.series(key)) for key, label in STEP_PARTS}
    parts = {label: values for label, values in parts.items() if values}
    if not whole or not parts:
        return None
    rest = {
        step: max(0.0, ms - sum(values.get(step, 0.0) for values in parts.values()))
        for step, ms in whole.items()
    }
    parts["rest (optimizers, reductions, Python)"] = rest
    curves = []
    for colour, (label, values) in enumerate(parts.items()):
        points = [(step, values.get(step, 0.0)) for step in sorted(whole)]
        curves.append(Curve(label, label, points, _smooth(points), colour))
    return Chart(
        "step_split",
        "Time of a step by part",
        "The parts add up to train/step_ms. Waiting for data should take almost no time.",
        "ms",
        curves,
        stacked=True,
    )


def evaluation_charts(evaluation: Evaluation) -> list[Bars | Lines]:
    """Return a chart per task: bars if there is only one length, otherwise lines over lengths."""
    charts: list[Bars | Lines] = []
    for task in dict.fromkeys(record["task"] for record in evaluation.records):
        records = [record for record in evaluation.records if record["task"] == task]
        histories = {record["seq_len"] for record in records}
        lengths = {record["wc_length"] for record in records if not is_bound(record)}
        common = (
            f"{evaluation.path.stem}_{task}",
            f"Loss by context policy: {task}",
            "Lower is better. Error bars are 1.96 standard errors of the mean; the paired"
            " differences in the table above are more precise.",
            LOSS,
        )
        if len(histories) == 1 and len(lengths) <= 1:
            charts.append(Bars(*common, [_bar(record) for record in records]))
        else:
            across = "history (tokens)" if len(histories) > 1 else "entries of the context"
            charts.append(Lines(*common, across, _lines(records, several=len(histories) > 1)))
    return charts


def _bar(record: dict[str, Any]) -> Bar:
    policy = record["policy"]
    kind = "lens" if policy == "lens" else "bound" if is_bound(record) else "rival"
    label = f"{policy} ({record['wc_length']})"
    return Bar(label, record["horizon_loss"], record.get("stderr"), kind, POLICIES.get(policy, ""))


def _lines(
    records: Sequence[dict[str, Any]], *, several: bool
) -> dict[str, list[tuple[float, float, float]]]:
    """Return points (x, value, standard error) by policy, over history lengths if there are
    `several`, otherwise over context lengths.
    """
    budgets = sorted({record["budget"] for record in records if not is_bound(record)})
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for record in sorted(records, key=lambda item: (item["seq_len"], item["wc_length"])):
        name = record["policy"]
        if several and len(budgets) > 1 and not is_bound(record):
            name += f", {record['budget']:.3g}"
        across = record["seq_len"] if several else record["wc_length"]
        point = (float(across), record["horizon_loss"], record.get("stderr") or 0.0)
        lines.setdefault(name, []).append(point)
    return lines
