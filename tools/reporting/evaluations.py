"""Reads the records of `launch/evaluate.py`, and compares policies.

Records are compared if they have the same task and lengths, on their common sequences. The bounds
(`full`, `tail`) have other numbers of entries.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting.statistics import Difference, paired

MOST_MAPS = 4
"""Maximum focus maps shown per file, because each contains a whole text."""
FIELDS = ("task", "policy", "budget", "wc_length", "seq_len", "horizon_loss", "n", "losses", "ids")
"""Required fields of a record."""
POLICIES = {
    "recency": "the last tokens, and nothing before them",
    "random": "random blocks opened",
    "uniform": "gists everywhere, the most recent blocks opened",
    "lens": "the blocks that LensNet scores highest opened",
    "blind": "LensNet without the question: it sees the tail of another text",
    "other_question": "LensNet with another question about the same text",
    "bm25": "blocks whose words match the query",
    "ngram": "blocks whose phrases match the query",
    "dense": "blocks whose embeddings are nearest to the query",
    "attention": "blocks with most attention from the query in the full context (a bound)",
    "oracle": "the blocks with the answers opened (a bound)",
    "full": "all tokens, uncompressed (a bound)",
    "tail": "only the protected tail (a bound)",
}
"""Short description of each policy's context."""


@dataclass(frozen=True)
class Evaluation:
    """One file of records."""

    path: Path
    records: list[dict[str, Any]]
    model: str | None = None
    """Path of the evaluated model, if known (from the file of focus maps)."""
    maps: Sequence[dict[str, Any]] = ()
    """The first focus maps of `launch/evaluate.py --show_focus`."""

    def cells(self) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
        """Group comparable records by task, history length and context length. Bounds are in every
        group of their task and history length.
        """
        cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        for record in self.records:
            if not is_bound(record):
                key = (record["task"], record["seq_len"], record["wc_length"])
                cells.setdefault(key, []).append(record)
        for (task, seq_len, _), records in cells.items():
            records += [
                record
                for record in self.records
                if is_bound(record) and (record["task"], record["seq_len"]) == (task, seq_len)
            ]
        return cells


def is_bound(record: dict[str, Any]) -> bool:
    """Return whether a record's policy has a fixed context length, whatever the budget."""
    return record["policy"] in ("full", "tail")


def lens_less(records: list[dict[str, Any]], other: str) -> Difference | None:
    """Return the loss of `lens` minus that of `other`, on their common sequences; None if one of
    them is missing.
    """
    found = {record["policy"]: record for record in records}
    if "lens" not in found or other not in found or other == "lens":
        return None
    ours, theirs = (
        dict(zip(found[n]["ids"], found[n]["losses"], strict=True)) for n in ("lens", other)
    )
    both = [i for i in ours if i in theirs and math.isfinite(ours[i]) and math.isfinite(theirs[i])]
    return paired([ours[i] for i in both], [theirs[i] for i in both]) if both else None


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Read all files of records in `folder` with their focus maps, eval.json first; ignore other
    JSON files. Raises ValueError for an invalid file of focus maps.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.name != "eval.json", path.name))
    found = [(path, _records(path)) for path in paths]
    return [Evaluation(path, records, *_focus(path)) for path, records in found if records]


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the records in a file; empty if it has other content."""
    content = _json(path)
    ours = isinstance(content, list) and all(
        isinstance(item, dict) and all(name in item for name in FIELDS) for item in content
    )
    return content if ours else []


def _focus(path: Path) -> tuple[str | None, Sequence[dict[str, Any]]]:
    """Return the model and the focus maps that belong to a file of records."""
    focus = path.with_name(f"{path.stem}_focus.json")
    if not focus.is_file():
        return None, ()
    try:
        content = _json(focus)
        return str(content["model"]), content["maps"][:MOST_MAPS]
    except (TypeError, KeyError):
        raise ValueError(
            f"{focus} is not a file of focus maps: evaluate again, or remove it"
        ) from None


def _json(path: Path) -> Any:
    """Return a file's content; None if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None
