"""The page: a self-contained HTML file, which needs no network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from reporting.charts import Chart, Drawing, charts_of, evaluation_charts
from reporting.comparison import evaluated
from reporting.evaluations import POLICIES, Evaluation
from reporting.figures import figure
from reporting.glossary import Entry
from reporting.markup import card, folded, html, paragraph, plain, table, verbatim
from reporting.runs import Run
from reporting.sections import (
    comparison_section,
    continuations,
    evaluation_tables,
    focus_introduction,
    headline,
    tiles,
)
from reporting.verdict import is_own

PAGE = Path(__file__).parent / "page"


class Report:
    """Collects the sections of a page."""

    def __init__(
        self, run: Run, evaluations: Sequence[Evaluation], entries: Sequence[Entry]
    ) -> None:
        self.run, self.evaluations, self.entries = run, evaluations, entries
        self.drawings: list[Drawing] = []
        """All charts, in the order of the page."""
        self.maps: list[dict[str, Any]] = []
        """All focus maps, in the order of the page."""
        self.parts: list[str] = [headline(run, evaluations), tiles(run)]

    def add_all(self, against: Run | None, theirs: Sequence[Evaluation]) -> None:
        """Add all sections for which there is content."""
        for evaluation in sorted(self.evaluations, key=self._place):
            self._evaluation(evaluation)
        self._curves(against)
        self.parts.append(continuations(self.run))
        if against is not None:
            rows = evaluated(self.evaluations, theirs)
            self.parts.append(comparison_section(self.run, against, rows))
        self._glossary()
        if self.run.config:
            text = yaml.safe_dump(self.run.config, sort_keys=False, allow_unicode=True)
            self.parts.append(folded("Settings of the run", html(verbatim(text))))

    def page(self, plotly: str) -> str:
        """Return the HTML file, which includes the source `plotly` of plotly.js."""
        figures = {drawing.name: figure(drawing) for drawing in self.drawings}
        content = {"figures": figures, "maps": self.maps, "policies": POLICIES}
        data = json.dumps(content, separators=(",", ":"))
        values = {
            "@title@": plain(f"{self.run.name}: report of the run"),
            "@style@": (PAGE / "page.css").read_text(),
            "@body@": "\n".join(self.parts),
            "@data@": data.replace("<", "\\u003c"),
            "@plotly@": plotly,
            "@script@": (PAGE / "page.js").read_text(),
        }
        page = (PAGE / "page.html").read_text()
        for mark, value in values.items():
            before, after = page.split(mark, 1)
            page = before + value + after
        return page

    def _place(self, evaluation: Evaluation) -> tuple[bool, bool]:
        """Return the sort key: evaluations that ask for facts first, the run's own before
        others.
        """
        asked = any(content["spans"] for content in evaluation.maps)
        return not asked, not is_own(self.run, evaluation)

    def _evaluation(self, evaluation: Evaluation) -> None:
        """Add focus maps, tables and charts of an evaluation."""
        whose = "This run" if is_own(self.run, evaluation) else "Another model"
        title = f"{whose}: {evaluation.model or evaluation.path.name}"
        self.parts.append(f"<h2>{html(title)}</h2>")
        if evaluation.maps:
            self.parts.append(focus_introduction(evaluation.maps, explained=bool(self.maps)))
            for content in evaluation.maps:
                where = f'<div id="map-{len(self.maps)}"></div>'
                self.maps.append(content)
                self.parts.append(card(content["title"], where))
        self.parts.append(evaluation_tables(evaluation))
        self.parts.append(self._grid(evaluation_charts(evaluation)))

    def _curves(self, against: Run | None) -> None:
        charts: list[Chart] = charts_of(self.run, against)
        self.parts.append("<h2>Training curves</h2>")
        smooth = "Thick curves are running means, thin ones single steps. "
        dashes = f"Dashed: {against.name}." if against is not None else ""
        self.parts.append(paragraph(smooth + dashes, "note"))
        self.parts.append(self._grid(charts))

    def _grid(self, drawings: Sequence[Drawing]) -> str:
        self.drawings += drawings
        cards = [
            card(
                drawing.title,
                paragraph(drawing.note, "note"),
                f'<div class="chart" id="chart-{plain(drawing.name)}"></div>',
            )
            for drawing in drawings
        ]
        return f'<div class="grid">{"".join(cards)}</div>'

    def _glossary(self) -> None:
        self.parts.append('<h2 id="glossary">Glossary of metrics</h2>')
        for section in dict.fromkeys(entry.section for entry in self.entries):
            rows = [
                (f"`{entry.key}`", entry.meaning, entry.unit, entry.reduction)
                for entry in self.entries
                if entry.section == section
            ]
            heads = ("key", "meaning", "unit", "reduction")
            self.parts.append(folded(section, table(heads, rows)))
