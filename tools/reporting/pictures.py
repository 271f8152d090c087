"""Draws charts as PNG with matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
# Select this backend before importing pyplot, so that no display is needed.
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from reporting.charts import Bars, Chart, Drawing, Lines

DPI = 110


def save_picture(drawings: Sequence[Drawing], path: Path) -> None:
    """Write one or more charts to a PNG file, one below the other."""
    heights = [_height(drawing) for drawing in drawings]
    figure, axes = plt.subplots(
        len(drawings),
        1,
        figsize=(9, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, drawing in zip(axes[:, 0], drawings, strict=True):
        axis.set_title(drawing.title, loc="left", fontweight="bold", parse_math=False)
        match drawing:
            case Chart():
                _chart(axis, drawing)
            case Bars():
                _bars(axis, drawing)
            case Lines():
                _lines(axis, drawing)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _height(drawing: Drawing) -> float:
    return 1.1 + 0.36 * len(drawing.bars) if isinstance(drawing, Bars) else 3.2


def _chart(axis: Axes, chart: Chart) -> None:
    if chart.band is not None:
        steps, widths = zip(*chart.band.half_width, strict=True)
        low = [-width for width in widths]
        axis.fill_between(steps, low, widths, color="0.85", label=chart.band.label)
    if chart.line is not None:
        axis.axhline(chart.line[0], color="0.5", linestyle=":", linewidth=1, label=chart.line[1])
    if chart.stacked:
        shared = [step for step, _ in chart.curves[0].smooth]
        layers = [[value for _, value in curve.smooth] for curve in chart.curves]
        axis.stackplot(shared, layers, labels=[curve.label for curve in chart.curves])
    else:
        for curve in chart.curves:
            colour, style = f"C{curve.colour % 10}", "--" if curve.against else "-"
            if curve.smooth != curve.points and not curve.against:
                axis.plot(*zip(*curve.points, strict=True), color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(
                *zip(*curve.smooth, strict=True),
                color=colour,
                linestyle=style,
                marker="o" if len(curve.points) < 30 else None,
                markersize=3,
                label=curve.label,
            )
    axis.set(xlabel="step", ylabel=chart.unit)
    axis.grid(alpha=0.3)
    _legend(axis)


def _bars(axis: Axes, bars: Bars) -> None:
    colours = {"lens": "#0b6bcb", "rival": "#8a97a6", "bound": "#c3cbd4"}
    axis.barh(
        [bar.label for bar in bars.bars],
        [bar.value for bar in bars.bars],
        xerr=[1.96 * (bar.error or 0.0) for bar in bars.bars],
        color=[colours[bar.kind] for bar in bars.bars],
    )
    axis.invert_yaxis()
    axis.set(xlabel=bars.unit)
    axis.grid(alpha=0.3, axis="x")


def _lines(axis: Axes, lines: Lines) -> None:
    for name, points in lines.lines.items():
        across, values, errors = zip(*points, strict=True)
        axis.errorbar(
            across, values, yerr=[1.96 * e for e in errors], marker="o", capsize=3, label=name
        )
    axis.set(xlabel=lines.across, ylabel=lines.unit)
    axis.grid(alpha=0.3)
    _legend(axis)


def _legend(axis: Axes) -> None:
    """Add a legend beside the chart, where it hides no curve."""
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
