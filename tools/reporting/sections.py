"""The sections of the page that are text and tables."""

import re
from collections.abc import Sequence

from reporting.comparison import PairedRow, figures, settings_that_differ
from reporting.evaluations import TOLD, Evaluation, lens_less
from reporting.focus import FocusMaps
from reporting.markup import Cell, Html, card, html, items, paragraph, table, verbatim
from reporting.runs import Run
from reporting.verdict import (
    Answer,
    Verdict,
    evaluation_verdict,
    lensnet_works,
    percent,
    signed,
    what_was_trained,
)

QUESTION = "Does LensNet, which chooses what is read in detail, work here?"
LEVELS = (
    ("l0", "read token by token (LOD0)"),
    ("l1", "{0} tokens read as one gist (LOD1)"),
    ("l2", "{1} tokens as one gist of gists (LOD2)"),
    ("l3", "{2} tokens as one entry (LOD3)"),
    ("nothing", "not read"),
    ("asked", "asked for"),
)
CONTINUATION = re.compile(r"val/continuation/\d+/prompt")
MOST_STAGES = 5
"""Validations after the first of which a continuation is shown."""


def headline(run: Run, evaluations: Sequence[Evaluation]) -> str:
    """Write what was trained, and the answer."""
    trained, verdict = what_was_trained(run), lensnet_works(run, evaluations)
    name, _, rest = trained.partition(": ")
    return f"<header><h1>{html(name)}</h1>{paragraph(rest[:1].upper() + rest[1:])}</header>" + (
        verdict_box(verdict, QUESTION)
    )


def verdict_box(verdict: Verdict, question: str) -> str:
    """Write the answer in large letters, why, and the figures behind it."""
    kind = {Answer.YES: "yes", Answer.NO: "no"}.get(verdict.answer, "")
    return (
        f'<div class="card verdict {kind}"><div class="question">{html(question)}</div>'
        f"<strong>{verdict.answer.value}</strong>: {html(verdict.reason)}."
        f"{items(verdict.evidence)}</div>"
    )


def tiles(run: Run) -> str:
    """Write key figures."""
    shown = (
        ("train/tokens", "{:,.0f}", "tokens trained on"),
        ("val/loss", "{:.3f}", "held-out loss (nats per token)"),
        ("train/tokens_per_s", "{:,.0f}", "tokens per second, lately"),
        ("train/step_ms", "{:,.0f}", "ms per step, lately"),
        ("mc/compression_ratio", "{:.2f}", "tokens per entry"),
    )
    cells = [f'<div class="tile"><b>{run.last_step:,}</b><span>optimizer steps</span></div>']
    for key, form, label in shown:
        value = run.recent(key) if "lately" in label else run.last(key)
        if value is not None:
            text = form.format(value)
            cells.append(f'<div class="tile"><b>{text}</b><span>{label}</span></div>')
    return f'<div class="tiles">{"".join(cells)}</div>'


def focus_introduction(maps: FocusMaps, *, explained: bool) -> str:
    """Say what the maps below show, unless that is `explained`, and the key to their colours."""
    block = maps.maps[0]["block_size"] if maps.maps else 0
    words = (
        "The history is longer than what the model may read. Each row is one way to choose what is"
        " read in detail, with the same number of entries (full and tail are bounds); time goes"
        " from left to right. Choose a row to see the text as it is read; point at the text for"
        " LensNet's scores (it opens what it scores highest); move the slider to see how the choice"
        " came about."
    )
    there = {
        lod
        for content in maps.maps
        for contexts in content["contexts"].values()
        for lod in contexts[-1]["lods"]
    }
    spans = any(content["spans"] for content in maps.maps)
    if spans:
        words += " At the right: how many of the facts asked for are read in full."
    shown = [
        f'<span class="{kind}">{html(text.format(block, block**2, block**3))}</span>'
        for kind, text in LEVELS
        if (kind[0] != "l" or int(kind[1]) in there) and (kind != "asked" or spans)
    ]
    told = "" if explained else paragraph(words)
    return f'{told}<div class="key">{"".join(shown)}</div>'


def evaluation_tables(evaluation: Evaluation) -> str:
    """Write for each task and length: the answer, the figures, and LensNet's paired differences."""
    parts = []
    for (task, seq_len, wc_length), records in evaluation.cells().items():
        parts.append(f"<h3>{html(f'{task}: {wc_length} entries for {seq_len} tokens')}</h3>")
        verdict = evaluation_verdict(records)
        if verdict is not None:
            parts.append(verdict_box(verdict, "Does LensNet's choice help?"))
        heads = ["policy", "lens less it", "by luck", "loss", "± error", "right tokens", "found"]
        heads += ["entries", "sequences", "what it reads"]
        rows: list[list[Cell]] = []
        for record in records:
            rows.append(
                [
                    record["policy"],
                    *_lens_cells(records, record["policy"]),
                    f"{record['horizon_loss']:.4f}",
                    _or_dash(record.get("stderr"), "{:.4f}"),
                    _or_dash(record.get("accuracy"), "{:.1%}"),
                    _or_dash(record.get("hit_rate"), "{:.1%}"),
                    str(record["wc_length"]),
                    str(record["n"]),
                    TOLD.get(record["policy"], ""),
                ]
            )
        parts.append(table(heads, rows, numbers=range(1, 9)))
    note = (
        "Loss: nats per token of the answers, mean over sequences. Found: spans that matter that "
        "are read token by token. Lens less it: the paired difference with its standard error, "
        "green where LensNet is better and luck alone would do as much in less than 5 % of cases "
        "(sign-flip test), red where it is worse."
    )
    return f'<div class="card">{"".join(parts)}{paragraph(note, "note")}</div>'


def _lens_cells(records: Sequence[dict[str, object]], policy: str) -> tuple[Cell, Cell]:
    """Write the difference of lens from a policy, and how often luck alone does this."""
    difference = lens_less(list(records), policy)
    if difference is None:
        return "–", "–"
    kind = "" if difference.chance >= 0.05 else "good" if difference.mean < 0 else "bad"
    return Html(f'<span class="{kind}">{signed(difference)}</span>'), percent(difference.chance)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def continuations(run: Run) -> str:
    """Write what the model wrote after held-out text, at a few validations from first to last;
    nothing where it was not asked to.
    """
    cards = []
    for key in (key for key in run.keys if CONTINUATION.fullmatch(key)):
        name = key.removesuffix("prompt")
        found = [record for record in run.records if key in record]
        first, last = found[0], found[-1]
        shown = {round(place * (len(found) - 1) / MOST_STAGES) for place in range(MOST_STAGES + 1)}
        rows: list[Sequence[Cell]] = [
            (f"step {found[place]['step']}", verbatim(found[place][f"{name}model"]))
            for place in sorted(shown)
        ]
        rows.append(("the text itself", verbatim(last[f"{name}text"])))
        title = f"Held-out sequence {name.split('/')[2]}"
        cards.append(
            card(title, html(verbatim(f"… {first[key]}")), table(("after", "what follows"), rows))
        )
    if not cards:
        return ""
    note = (
        "A few tokens after the text above each table, each the likeliest one, as the model wrote"
        " them at validations in training."
    )
    return f"<h2>What the model writes</h2>{paragraph(note, 'note')}" + (
        f'<div class="grid">{"".join(cards)}</div>'
    )


def comparison_section(ours: Run, theirs: Run, rows: Sequence[PairedRow]) -> str:
    """Write two runs side by side."""
    parts = [f"<h2>{html(f'{ours.name} against {theirs.name}')}</h2>", '<div class="card">']
    changed = settings_that_differ(ours, theirs)
    if changed:
        cells = [(f"`{path}`", str(one), str(two)) for path, one, two in changed]
        parts.append(table(("setting", ours.name, theirs.name), cells))
    heads = ["figure", ours.name, theirs.name, "difference", "taken at"]
    lines = [
        (
            f"`{row.key}`",
            f"{row.ours:,.4g}",
            f"{row.theirs:,.4g}",
            f"{row.difference:+,.3g}",
            row.how,
        )
        for row in figures(ours, theirs)
    ]
    parts.append(table(heads, lines, numbers=(1, 2, 3)))
    if rows:
        heads = [
            "task",
            "policy",
            "entries",
            ours.name,
            theirs.name,
            "paired difference",
            "by luck",
        ]
        cells_of = [
            (
                row.task,
                row.policy,
                str(row.wc_length),
                f"{row.ours:.4f}",
                f"{row.theirs:.4f}",
                signed(row.difference),
                percent(row.difference.chance),
            )
            for row in rows
        ]
        parts.append(table(heads, cells_of, numbers=range(2, 7)))
    return "".join([*parts, "</div>"])
