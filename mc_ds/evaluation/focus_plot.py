"""Plot what policies read of a sequence: a panel per sequence, a row per policy, the level of
detail along the history.

Levels differ in height and lightness, so the figure is readable without colours.

Legend: T tokens, h horizon, K block size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextToPath
from numpy.typing import NDArray

from mc_ds.drawing import NOT_READ
from mc_ds.evaluation.views import Focus
from mc_ds.focus.policies import POLICIES

COLOURS = {0: "#08306b", 1: "#5b9fd0", 2: "#9dc7e4", 3: "#aebfce"}
"""Colour of the bars per level."""
HEIGHTS = {0: 0.8, 1: 0.46, 2: 0.26, 3: 0.13}
"""Height of the bars per level, as a fraction of a row."""
ASKED, GREY = "#d55e00", "#6e6e6e"
WIDTH, LEFT, RIGHT = 10.0, 1.25, 1.0
"""Width of the figure and margins of the panels, in inches."""
ROW, TITLE, AXIS, LEGEND_LINE = 0.32, 0.22, 0.36, 0.22
"""Heights in inches of a row, a panel's title, its axis, and a line of the legend."""
DPI = 120
LABEL = FontProperties(size=9, weight="bold")
"""Font of the labels that show the texts of the spans."""
GAP = 0.12
"""Smallest distance between two of these labels, in inches."""
MOST_CHARACTERS = 24
MOST_PANELS = 64
"""Largest number of panels in a figure: the height of an image is limited."""
LEGEND_COLUMNS = 4


def save_focus_plot(foci: Sequence[Focus], path: Path) -> Path:
    """Write a PNG with a panel for each of the first MOST_PANELS of `foci` (at least one, all of
    one model). Return its path.
    """
    left_out = len(foci) - MOST_PANELS
    foci = foci[:MOST_PANELS]
    handles = _legend(foci)
    legend_height = LEGEND_LINE * -(-len(handles) // LEGEND_COLUMNS) + 0.15
    heights = [TITLE + ROW * _rows(focus) + AXIS for focus in foci]
    total = legend_height + sum(heights) + 0.15  # the last axis has a label
    figure = plt.figure(figsize=(WIDTH, total))
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=LEGEND_COLUMNS,
        fontsize=9,
        frameon=False,
        borderaxespad=0.3,
        handlelength=2.2,
    )
    top = total - legend_height
    for focus, height in zip(foci, heights, strict=True):
        bottom = top - height + AXIS
        panel = figure.add_axes(
            (LEFT / WIDTH, bottom / total, 1 - (LEFT + RIGHT) / WIDTH, ROW * _rows(focus) / total)
        )
        _panel(panel, focus)
        top -= height
    panel.set_xlabel(
        "tokens of the history"
        + (f" ({left_out} more sequences are not drawn)" if left_out > 0 else ""),
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def runs(levels: NDArray[np.int64], level: int) -> NDArray[np.int64]:
    """Return the first token and the length of each run of `level` in `levels` [T], as [n, 2]."""
    edges = np.flatnonzero(np.diff(levels == level, prepend=False, append=False)).reshape(-1, 2)
    return np.stack([edges[:, 0], edges[:, 1] - edges[:, 0]], axis=1)


def _rows(focus: Focus) -> float:
    """Return the height of a panel in rows: the policies, a lane above them for texts and tail, and
    one below for spans that the question does not ask for.
    """
    return _above(focus) + max(1, len(focus.contexts)) + _below(focus)


def _above(focus: Focus) -> float:
    return 1.35 if len(focus.sample.spans) else 0.4


def _below(focus: Focus) -> float:
    return 0.6 if len(focus.sample.distractors) else 0.1


def _panel(panel: Axes, focus: Focus) -> None:
    seq_len, policies = focus.geometry.seq_len, list(focus.contexts)
    last = max(1, len(policies)) - 0.5
    panel.set(xlim=(0, seq_len), ylim=(last + _below(focus), -0.5 - _above(focus)))
    panel.set_title(focus.title, loc="left", fontsize=10.5, fontweight="bold", parse_math=False)
    panel.set_yticks(
        range(len(policies)), [_label(focus, policy) for policy in policies], fontsize=10
    )
    panel.set_xticks(range(0, seq_len + 1, max(1, seq_len // 8)))
    panel.tick_params(axis="x", labelsize=9)
    panel.tick_params(axis="y", length=0)
    for side in ("left", "top", "right"):
        panel.spines[side].set_visible(False)
    for row, policy in enumerate(policies):
        levels = focus.token_lods(policy)[: focus.known]
        for first, tokens in runs(levels, NOT_READ):
            panel.hlines(row, first, first + tokens, colors=GREY, linestyles=":", linewidth=1)
        for level, height in HEIGHTS.items():
            panel.broken_barh(
                runs(levels, level).tolist(),
                (row - height / 2, height),
                facecolors=COLOURS[level],
                linewidth=0,
            )
    horizon = (focus.known, seq_len - focus.known)
    panel.broken_barh(
        [horizon],
        (-0.5, last + 0.5),
        facecolors="none",
        edgecolors=GREY,
        hatch="/////",
        linewidth=0,
    )
    panel.plot(
        [focus.geometry.head_len, focus.known],
        [-0.62] * 2,
        color=GREY,
        linewidth=4,
        solid_capstyle="butt",
    )
    panel.vlines(focus.geometry.head_len, -0.62, last, colors=GREY, linestyles=":", linewidth=1)
    if len(focus.sample.distractors):
        panel.vlines(
            focus.sample.distractors.mean(axis=1),
            last + 0.12,
            last + 0.45,
            colors=GREY,
            linewidth=1,
        )
    if len(focus.sample.spans):
        _asked(panel, focus, last + _below(focus))


def _asked(panel: Axes, focus: Focus, bottom: float) -> None:
    """Mark the spans that the question asks for in every row, with their texts above, and to the
    right how many of them each policy reads completely at LOD0.
    """
    seq_len, centres = focus.geometry.seq_len, focus.sample.spans.mean(axis=1)
    panel.vlines(centres, -0.85, bottom, colors=ASKED, linewidth=1)
    edge = [patheffects.withStroke(linewidth=4, foreground="white")]
    for row, policy in enumerate(focus.contexts):
        opened = focus.opened(policy)
        panel.plot(
            centres[opened],
            [row] * opened.sum(),
            "o",
            color=ASKED,
            markersize=9,
            markeredgecolor="white",
            clip_on=False,
        )
        missed = [row] * (~opened).sum()
        panel.plot(
            centres[~opened],
            missed,
            "x",
            color=ASKED,
            markersize=7,
            markeredgewidth=2,
            path_effects=edge,
            clip_on=False,
        )
        weight = "bold" if opened.all() else "normal"
        panel.text(
            seq_len * 1.012,
            row,
            f"{opened.sum()} of {len(opened)}",
            va="center",
            fontsize=10,
            fontweight=weight,
        )
    panel.text(seq_len * 1.012, -0.62, "asked for,\nread in full", va="bottom", fontsize=8)
    if focus.texts:
        texts = [_printable(text) for text in focus.texts]
        inches = [
            GAP + TextToPath().get_text_width_height_descent(text, LABEL, ismath=False)[0] / 72
            for text in texts
        ]
        places = spread(centres, np.array(inches) * seq_len / (WIDTH - LEFT - RIGHT), seq_len)
        if places is not None:
            for text, centre, place in zip(texts, centres, places, strict=True):
                panel.plot([centre, place], [-0.85, -1.1], color=ASKED, linewidth=1, clip_on=False)
                panel.text(
                    place,
                    -1.14,
                    text,
                    ha="center",
                    va="bottom",
                    color=ASKED,
                    fontproperties=LABEL,
                    parse_math=False,
                )


def spread(centres: NDArray[Any], widths: NDArray[Any], room: float) -> NDArray[Any] | None:
    """Return positions [n] in 0..`room` for labels of `widths` [n], close to `centres` [n] and
    without overlap; None if they do not fit.
    """
    if widths.sum() > room:
        return None
    order = np.argsort(centres, kind="stable")
    # The labels' centres if they are packed without gaps from 0.
    packed = np.cumsum(widths[order]) - widths[order] / 2
    wanted = (centres[order] - packed).tolist()
    groups: list[list[float]] = []  # labels that touch share their mean offset
    for offset in wanted:
        groups.append([offset])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    offsets = np.concatenate([np.full(len(group), np.mean(group)) for group in groups])
    places = np.empty(len(centres))
    places[order] = offsets.clip(0, room - widths.sum()) + packed
    return places


def _label(focus: Focus, policy: str) -> str:
    """Return the policy's name, followed by its number of entries if it ignores the budget."""
    entries = len(focus.contexts[policy][0])
    return policy if POLICIES[policy].fixed_length is None else f"{policy} ({entries})"


def _printable(text: str) -> str:
    """Return `text` on one line, shortened to MOST_CHARACTERS."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def _legend(foci: Sequence[Focus]) -> list[Line2D | Patch]:
    """Return legend handles for everything that occurs in the panels."""
    block_size = foci[0].geometry.block_size
    words = {
        0: "tokens",
        1: f"gists of {block_size} tokens",
        2: f"gists of gists ({block_size**2} tokens)",
        3: f"gists of gists of gists ({block_size**3} tokens)",
    }
    there = {
        int(level)
        for focus in foci
        for policy in focus.contexts
        for level in np.unique(focus.token_lods(policy)[: focus.known])
    }
    handles: list[Line2D | Patch] = [
        Line2D(
            [],
            [],
            color=COLOURS[level],
            linewidth=14 * HEIGHTS[level],
            solid_capstyle="butt",
            label=text,
        )
        for level, text in words.items()
        if level in there
    ]
    if NOT_READ in there:
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1, label="not read"))
    handles.append(
        Line2D(
            [],
            [],
            color=GREY,
            linewidth=4,
            solid_capstyle="butt",
            label="protected tail: always tokens",
        )
    )
    handles.append(
        Patch(facecolor="none", edgecolor=GREY, hatch="/////", linewidth=0, label="to be predicted")
    )
    marks: dict[str, Any] = dict(color=ASKED, linestyle="none")
    if any(len(focus.sample.spans) for focus in foci):
        handles.append(
            Line2D(
                [],
                [],
                marker="o",
                markersize=9,
                markeredgecolor="white",
                label="asked for: read in full",
                **marks,
            )
        )
        handles.append(
            Line2D(
                [],
                [],
                marker="x",
                markersize=7,
                markeredgewidth=2,
                label="asked for: not read in full",
                **marks,
            )
        )
    if any(len(focus.sample.distractors) for focus in foci):
        handles.append(
            Line2D(
                [],
                [],
                color=GREY,
                linestyle="none",
                marker="|",
                markersize=8,
                label="not asked for",
            )
        )
    return handles
