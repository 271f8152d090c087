"""The sections of the page that consist of text and tables."""

import re
from collections.abc import Sequence
from typing import Any

from reporting.comparison import PairedRow, figures, settings_that_differ
from reporting.evaluations import POLICIES, Evaluation, lens_less
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
    ("l2", "{1} tokens read as one gist of gists (LOD2)"),
    ("l3", "{2} tokens read as one entry (LOD3)"),
    ("nothing", "not read"),
    ("asked", "asked for"),
)
"""CSS class and label of each colour in the focus maps' legend."""
CONTINUATION = re.compile(r"val/continuation/\d+/prompt")
MOST_STAGES = 5
"""Number of validations, besides the first, whose continuations are shown."""


def headline(run: Run, evaluations: Sequence[Evaluation]) -> str:
    """Return the header: what was trained, and whether LensNet works."""
    trained, verdict = what_was_trained(run), lensnet_works(run, evaluations)
    name, _, rest = trained.partition(": ")
    return f"<header><h1>{html(name)}</h1>{paragraph(rest[:1].upper() + rest[1:])}</header>" + (
        verdict_box(verdict, QUESTION)
    )


def verdict_box(verdict: Verdict, question: str) -> str:
    """Return a box with the question, the answer, its reason and the evidence."""
    kind = {Answer.YES: "yes", Answer.NO: "no"}.get(verdict.answer, "")
    return (
        f'<div class="card verdict {kind}"><div class="question">{html(question)}</div>'
        f"<strong>{verdict.answer.value}</strong>: {html(verdict.reason)}."
        f"{items(verdict.evidence)}</div>"
    )


def tiles(run: Run) -> str:
    """Return the boxes with key metrics."""
    shown = (
        ("train/tokens", "{:,.0f}", "tokens trained on"),
        ("val/loss", "{:.3f}", "held-out loss (nats per token)"),
        ("train/tokens_per_s", "{:,.0f}", "tokens per second (recent mean)"),
        ("train/step_ms", "{:,.0f}", "ms per step (recent mean)"),
        ("mc/compression_ratio", "{:.2f}", "tokens per entry"),
    )
    cells = [f'<div class="tile"><b>{run.last_step:,}</b><span>optimizer steps</span></div>']
    for key, form, label in shown:
        value = run.recent(key) if "recent" in label else run.last(key)
        if value is not None:
            text = form.format(value)
            cells.append(f'<div class="tile"><b>{text}</b><span>{label}</span></div>')
    return f'<div class="tiles">{"".join(cells)}</div>'


def focus_introduction(maps: Sequence[dict[str, Any]], *, explained: bool) -> str:
    """Return the legend of the focus maps, after a text that explains them unless already
    `explained`.
    """
    block = maps[0]["block_size"]
    words = (
        "The history is longer than the model's context. Each row is one policy that chooses what"
        " is read in detail, all with the same number of entries (except the bounds full and"
        " tail); time runs from left to right. Click a row to see the text as the model reads it;"
        " point at the text to see LensNet's scores (it opens what it scores highest); move the"
        " slider to see the rounds in which it chose."
    )
    levels = {
        lod
        for content in maps
        for contexts in content["contexts"].values()
        for lod in contexts[-1]["lods"]
    }
    spans = any(content["spans"] for content in maps)
    if spans:
        words += " At the right: how many of the facts asked for are uncompressed."
    shown = [
        f'<span class="{kind}">{html(text.format(block, block**2, block**3))}</span>'
        for kind, text in LEVELS
        if (kind[0] != "l" or int(kind[1]) in levels) and (kind != "asked" or spans)
    ]
    explanation = "" if explained else paragraph(words)
    return f'{explanation}<div class="key">{"".join(shown)}</div>'


def evaluation_tables(evaluation: Evaluation) -> str:
    """Return, for each task and length, the verdict and a table with paired differences."""
    parts = []
    for (task, seq_len, wc_length), records in evaluation.cells().items():
        parts.append(f"<h3>{html(f'{task}: {wc_length} entries for {seq_len} tokens')}</h3>")
        verdict = evaluation_verdict(records)
        if verdict is not None:
            parts.append(verdict_box(verdict, "Does LensNet's choice help?"))
        heads = ["policy", "lens minus it", "p-value", "loss", "± error", "accuracy", "hit rate"]
        heads += ["entries", "sequences", "context"]
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
                    POLICIES.get(record["policy"], ""),
                ]
            )
        parts.append(table(heads, rows, numbers=range(1, 9)))
    note = (
        "Loss: nats per token of the answers (of plain text: of its last tokens), mean over"
        " sequences. Accuracy: share of these tokens predicted correctly. Hit rate: share of"
        " relevant spans that are uncompressed. Lens minus it: paired difference with standard"
        " error, green if LensNet is better, red if worse, with a p-value below 5 % (sign-flip"
        " test)."
    )
    return f'<div class="card">{"".join(parts)}{paragraph(note, "note")}</div>'


def _lens_cells(records: Sequence[dict[str, object]], policy: str) -> tuple[Cell, Cell]:
    """Return the cells "lens minus it" and "p-value"."""
    difference = lens_less(list(records), policy)
    if difference is None:
        return "–", "–"
    kind = "" if difference.chance >= 0.05 else "good" if difference.mean < 0 else "bad"
    return Html(f'<span class="{kind}">{signed(difference)}</span>'), percent(difference.chance)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def continuations(run: Run) -> str:
    """Return the model's continuations of held-out text at some validations, from first to last;
    empty if there are none.
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
        rows.append(("true text", verbatim(last[f"{name}text"])))
        title = f"Held-out sequence {name.split('/')[2]}"
        cards.append(
            card(title, html(verbatim(f"… {first[key]}")), table(("after", "continuation"), rows))
        )
    if not cards:
        return ""
    note = (
        "Continuations of the text above each table, a few tokens long, generated greedily at"
        " validations during training."
    )
    return f"<h2>What the model writes</h2>{paragraph(note, 'note')}" + (
        f'<div class="grid">{"".join(cards)}</div>'
    )


def comparison_section(ours: Run, theirs: Run, rows: Sequence[PairedRow]) -> str:
    """Return the comparison of two runs."""
    parts = [f"<h2>{html(f'{ours.name} against {theirs.name}')}</h2>", '<div class="card">']
    changed = settings_that_differ(ours, theirs)
    if changed:
        cells = [(f"`{path}`", str(one), str(two)) for path, one, two in changed]
        parts.append(table(("setting", ours.name, theirs.name), cells))
    heads = ["metric", ours.name, theirs.name, "difference", "at"]
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
            "p-value",
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
