"""Writes a self-contained page about a run, RUN/report.html: whether LensNet works and how certain
that is, curves, evaluations, focus maps and a glossary of metrics. RUN/report/ has the charts as
PNG.

Usage: python tools/report.py runs/demo
       python tools/report.py runs/demo --against runs/other
"""

import argparse
import sys
from pathlib import Path

from reporting.document import Report
from reporting.evaluations import read_evaluations
from reporting.glossary import glossary
from reporting.pictures import save_picture
from reporting.runs import open_run

from mc_ds.console import HelpFormatter, run_program
from mc_ds.storage import replace_text


def write_report(folder: Path, against: Path | None = None) -> Path:
    """Write the page and its pictures; return the page's path. Raises ValueError if a folder is not
    a run, or a file in it cannot be read.
    """
    other = None if against is None else open_run(against)
    theirs = [] if against is None else read_evaluations(against)
    report = Report(open_run(folder), read_evaluations(folder), glossary())
    report.add_all(other, theirs)
    page = folder / "report.html"
    replace_text(page, report.page(plotly_js()))
    pictures = folder / "report"
    pictures.mkdir(exist_ok=True)
    for drawing in report.drawings:
        save_picture([drawing], pictures / f"{drawing.name}.png")
    return page


def plotly_js() -> str:
    """Return the source of plotly.js. Raises ValueError if plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise ValueError("a report needs plotly: pip install 'mc_ds[report]'") from None
    text: str = get_plotlyjs()
    return text


def main(arguments: list[str] | None = None) -> int:
    """Write the report and return the exit code: 0 done, 2 if the run cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/demo")
    parser.add_argument("--against", type=Path, help="folder of a run to compare it with")
    options = parser.parse_args(arguments)
    try:
        page = write_report(options.run, options.against)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {page} (pictures: {page.parent / 'report'})")
    return 0


if __name__ == "__main__":
    run_program(main)
