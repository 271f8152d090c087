"""Converts charts to plotly figures.

Colours are placeholders (`@1`, `@muted`, ...), which the page replaces by those of its scheme.
"""

from collections.abc import Sequence
from typing import Any

from reporting.charts import Bar, Bars, Chart, Curve, Drawing, Lines

COLOURS = 8
"""Number of colours that curves use in turn."""
Figure = dict[str, Any]


def colour(number: int) -> str:
    """Return the placeholder of a colour."""
    return f"@{number % COLOURS}"


def figure(drawing: Drawing) -> Figure:
    """Return a plotly figure: `data` and `layout`."""
    match drawing:
        case Chart():
            return _chart(drawing)
        case Bars():
            return _bars(drawing)
        case Lines():
            return _lines(drawing)


def _chart(chart: Chart) -> Figure:
    traces: list[dict[str, Any]] = []
    if chart.band is not None:
        traces += _band(chart.band.half_width, chart.band.label)
    for curve in chart.curves:
        traces += [_area(curve)] if chart.stacked else _curve(curve)
    if chart.line is not None:
        level, name = chart.line
        steps = [step for curve in chart.curves for step, _ in curve.points]
        dotted = dict(color="@muted", width=1.5, dash="dot")
        traces.append(
            dict(type="scatter", mode="lines", name=name, line=dotted, hoverinfo="skip")
            | dict(x=[min(steps), max(steps)], y=[level, level])
        )
    layout = _layout("step", chart.unit)
    layout["height"] += 20 * max(0, len(chart.curves) - 4)  # a narrow legend has a line for each
    return {"data": traces, "layout": layout}


def _band(half_width: Sequence[tuple[int, float]], label: str) -> list[dict[str, Any]]:
    steps = [step for step, _ in half_width]
    shared: dict[str, Any] = dict(
        type="scatter", mode="lines", hoverinfo="skip", line=dict(width=0)
    )
    low, high = ([sign * width for _, width in half_width] for sign in (-1, 1))
    return [
        shared | dict(x=steps, y=low, showlegend=False),
        shared | dict(x=steps, y=high, fill="tonexty", fillcolor="@band", name=label),
    ]


def _curve(curve: Curve) -> list[dict[str, Any]]:
    """Return traces of the smoothed curve and, if different, of the raw curve behind it."""
    line: dict[str, Any] = dict(color=colour(curve.colour), width=2.2)
    if curve.against:
        line["dash"] = "dash"
    steps, values = _columns(curve.points)
    _, means = _columns(curve.smooth)
    traces: list[dict[str, Any]] = []
    if means != values and not curve.against:
        thin = dict(color=colour(curve.colour), width=1)
        raw: dict[str, Any] = dict(type="scatter", mode="lines", x=steps, y=values, line=thin)
        traces.append(raw | dict(opacity=0.28, hoverinfo="skip", showlegend=False))
    mode = "lines+markers" if len(steps) < 30 else "lines"
    smooth: dict[str, Any] = dict(type="scatter", mode=mode, x=steps, y=means, line=line)
    return [*traces, smooth | dict(name=curve.label, hovertemplate="%{y:.4g}")]


def _area(curve: Curve) -> dict[str, Any]:
    steps, means = _columns(curve.smooth)
    trace: dict[str, Any] = dict(type="scatter", mode="lines", stackgroup="parts", x=steps, y=means)
    shade = dict(line=dict(width=0.5, color=colour(curve.colour)), fillcolor=colour(curve.colour))
    return trace | shade | dict(name=curve.label, hovertemplate="%{y:,.1f} ms")


def _bars(bars: Bars) -> Figure:
    """Return a figure of horizontal bars, with the first policy on top."""
    shown = list(reversed(bars.bars))
    trace: dict[str, Any] = dict(
        type="bar",
        orientation="h",
        y=[bar.label for bar in shown],
        x=[bar.value for bar in shown],
        customdata=[[bar.about] for bar in shown],
        text=[f"{bar.value:.3g}" for bar in shown],
        textposition=[_inside(bar.value, shown) for bar in shown],
        insidetextanchor="start",
        insidetextfont=dict(
            color=["@on-lod0" if bar.kind == "lens" else "@on-bar" for bar in shown]
        ),
        outsidetextfont=dict(color="@text"),
        marker=dict(color=[_shade(bar) for bar in shown]),
        error_x=dict(
            array=[1.96 * (bar.error or 0.0) for bar in shown], color="@text", thickness=1.2
        ),
        hovertemplate="%{y}: %{x:.4f}<br>%{customdata[0]}<extra></extra>",
        showlegend=False,
    )
    layout = _layout(bars.unit, "")
    layout |= dict(hovermode="closest", height=90 + 34 * len(shown), bargap=0.25)
    layout["yaxis"] |= dict(showgrid=False)
    layout["xaxis"] |= dict(rangemode="tozero")
    return {"data": [trace], "layout": layout}


def _inside(value: float, bars: Sequence[Bar]) -> str:
    """Return the position of a bar's value: inside, or outside if the bar is short."""
    return "inside" if value > 0.1 * max(bar.value for bar in bars) else "outside"


def _shade(bar: Bar) -> str:
    return {"lens": "@0", "rival": "@rival", "bound": "@bound"}[bar.kind]


def _lines(lines: Lines) -> Figure:
    traces = []
    for number, (name, points) in enumerate(lines.lines.items()):
        across, values, errors = zip(*points, strict=True)
        traces.append(
            dict(type="scatter", mode="lines+markers", name=name, x=across, y=values)
            | dict(line=dict(color=colour(number), width=2))
            | dict(error_y=dict(array=[1.96 * error for error in errors], thickness=1))
            | dict(hovertemplate="%{y:.4f}")
        )
    return {"data": traces, "layout": _layout(lines.across, lines.unit)}


def _layout(across: str, unit: str) -> dict[str, Any]:
    axis = dict(gridcolor="@grid", zerolinecolor="@grid", linecolor="@grid", tickcolor="@grid")
    return dict(
        height=300,
        margin=dict(l=56, r=12, t=8, b=44),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(color="@text", size=12, family="system-ui, sans-serif"),
        hovermode="x unified",
        hoverlabel=dict(bgcolor="@card", bordercolor="@grid", font=dict(color="@text")),
        legend=dict(orientation="h", y=1.02, yanchor="bottom", x=0, traceorder="normal"),
        xaxis=axis | dict(title=dict(text=across)),
        yaxis=axis | dict(title=dict(text=unit, standoff=8), automargin=True),
    )


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
