"""The tables of docs/metrics.md, which is the source: every metric key with its meaning."""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@dataclass(frozen=True)
class Entry:
    """A row of a table: a key, or keys that differ in the part in braces."""

    section: str
    key: str
    meaning: str
    """Markdown."""
    unit: str
    reduction: str


def glossary(page: Path = PAGE) -> list[Entry]:
    """Return all rows, in the page's order."""
    entries, section = [], ""
    for line in page.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip()
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            entries.append(Entry(section, cells[0].strip("`"), *cells[1:]))
    return entries
