"""Records of `launch/evaluate.py` as a report shows them: bars, and paired differences.

A record is compared with others of the same task and lengths, over the sequences that both read.
The bounds (`full`, `tail`) read other numbers of entries.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting.statistics import Difference, paired

FIELDS = ("task", "policy", "budget", "wc_length", "seq_len", "horizon_loss", "n", "losses", "ids")
"""What a record must have."""
TOLD = {
    "recency": "the last tokens, nothing before them",
    "random": "places opened by chance",
    "uniform": "coarse everywhere, the newest detail opened",
    "lens": "what LensNet scores highest",
    "blind": "LensNet without the question: the tail of another text",
    "other_question": "LensNet given another question about the same text",
    "bm25": "blocks whose words match those of the end",
    "ngram": "blocks whose phrases match those of the end",
    "dense": "blocks whose meaning is nearest the end's",
    "attention": "blocks that the end attends to in the full context: a bound that reads all",
    "oracle": "opens the answers: a bound that knows them",
    "full": "everything, token by token: an upper bound",
    "tail": "the protected tail alone: a lower bound",
}
"""What each policy reads, in a few words."""


@dataclass(frozen=True)
class Evaluation:
    """One file of records."""

    path: Path
    records: list[dict[str, Any]]
    model: str | None = None
    """What was evaluated, where the file of its focus maps tells."""

    def cells(self) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
        """Return records that may be compared, by task, history and entries. Bounds are in every
        cell of their task and history.
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
    """Return whether it is a policy whose entries no budget sets."""
    return record["policy"] in ("full", "tail")


def lens_less(records: list[dict[str, Any]], other: str) -> Difference | None:
    """Return the loss under `lens` less that under `other`, over the sequences that both read; None
    where one of them is missing.
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
    """Read every file of records in `folder`, eval.json first. Other JSON files are left alone."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.name != "eval.json", path.name))
    found = [(path, _records(path)) for path in paths]
    return [Evaluation(path, records, _model(path)) for path, records in found if records]


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none where it holds something else."""
    content = _json(path)
    ours = isinstance(content, list) and all(
        isinstance(item, dict) and all(name in item for name in FIELDS) for item in content
    )
    return content if ours else []


def _model(path: Path) -> str | None:
    focus = path.with_name(f"{path.stem}_focus.json")
    content = _json(focus) if focus.is_file() else None
    return str(content["model"]) if isinstance(content, dict) and "model" in content else None


def _json(path: Path) -> Any:
    """Return what a file holds; None where it is no JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None
