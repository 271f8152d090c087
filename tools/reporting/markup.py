"""Small pieces of HTML. Text is escaped here, and nowhere else."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Html:
    """Text that is HTML already."""

    text: str


Cell = str | Html


def html(text: Cell) -> str:
    """Write it as HTML: escaped, with the Markdown that metric tables use: `code`, **bold**."""
    if isinstance(text, Html):
        return text.text
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", marked)


def plain(text: str) -> str:
    """Write it as HTML without any markup."""
    return escape(text)


def verbatim(text: str) -> Html:
    """Write text of a file or a model, every space and line as it is."""
    return Html(f"<pre>\n{plain(text)}</pre>")  # a browser drops the first line end


def paragraph(text: Cell, kind: str = "") -> str:
    """Write a paragraph, of a class where `kind` names one."""
    return f'<p class="{kind}">{html(text)}</p>' if kind else f"<p>{html(text)}</p>"


def items(texts: Iterable[Cell]) -> str:
    """Write a list; nothing where it is empty."""
    lines = "".join(f"<li>{html(text)}</li>" for text in texts)
    return f"<ul>{lines}</ul>" if lines else ""


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, numbers: Iterable[int] = ()
) -> str:
    """Write a table that scrolls by itself where it is too wide, `numbers` columns to the right."""
    right = set(numbers)

    def line(cells: Sequence[Cell], tag: str) -> str:
        classes = [' class="n"' if place in right else "" for place in range(len(cells))]
        parts = zip(classes, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{c}>{html(cell)}</{tag}>" for c, cell in parts) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    head = line(list(heads), "th")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def card(title: str, *parts: str) -> str:
    """Write a titled box."""
    return f'<section class="card"><h3>{html(title)}</h3>{"".join(parts)}</section>'


def folded(title: str, *parts: str) -> str:
    """Write something that opens on a click."""
    return f"<details><summary>{html(title)}</summary>{''.join(parts)}</details>"
