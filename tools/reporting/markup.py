"""Builds small pieces of HTML. All escaping of text happens here."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Html:
    """Text that is already HTML."""

    text: str


Cell = str | Html


def html(text: Cell) -> str:
    """Convert text to HTML: escape it, and convert Markdown's `code` and **bold**."""
    if isinstance(text, Html):
        return text.text
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", marked)


def plain(text: str) -> str:
    """Escape text, without converting any markup."""
    return escape(text)


def verbatim(text: str) -> Html:
    """Return preformatted text, with all spaces and line breaks."""
    return Html(f"<pre>\n{plain(text)}</pre>")  # browsers drop the first line break


def paragraph(text: Cell, kind: str = "") -> str:
    """Return a paragraph, with CSS class `kind` if given."""
    return f'<p class="{kind}">{html(text)}</p>' if kind else f"<p>{html(text)}</p>"


def items(texts: Iterable[Cell]) -> str:
    """Return a bullet list; empty text for an empty list."""
    lines = "".join(f"<li>{html(text)}</li>" for text in texts)
    return f"<ul>{lines}</ul>" if lines else ""


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, numbers: Iterable[int] = ()
) -> str:
    """Return a table that scrolls if it is too wide. Columns `numbers` are right-aligned."""
    right = set(numbers)

    def line(cells: Sequence[Cell], tag: str) -> str:
        classes = [' class="n"' if place in right else "" for place in range(len(cells))]
        parts = zip(classes, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{c}>{html(cell)}</{tag}>" for c, cell in parts) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    head = line(list(heads), "th")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def card(title: str, *parts: str) -> str:
    """Return a box with a title."""
    return f'<section class="card"><h3>{html(title)}</h3>{"".join(parts)}</section>'


def folded(title: str, *parts: str) -> str:
    """Return a section that opens on a click."""
    return f"<details><summary>{html(title)}</summary>{''.join(parts)}</details>"
