"""The glossary of metrics, read from the tables in docs/metrics.md."""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@dataclass(frozen=True)
class Entry:
    """A row of a table. A key with a part in braces stands for several."""

    section: str
    key: str
    meaning: str
    """Markdown."""
    unit: str
    reduction: str


def glossary(page: Path = PAGE) -> list[Entry]:
    """Return all rows, in the order of the page."""
    entries, section = [], ""
    for line in page.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip()
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            entries.append(Entry(section, cells[0].strip("`"), *cells[1:]))
    return entries
