"""Reads the focus maps written by `launch/evaluate.py --show_focus`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_MAPS = 4
"""Maximum maps shown per file, because each contains a whole text."""


@dataclass(frozen=True)
class FocusMaps:
    """The focus maps in one file."""

    path: Path
    model: str
    maps: Sequence[dict[str, Any]]


def read_focus_maps(folder: Path) -> list[FocusMaps]:
    """Read the maps of every `*_focus.json` in `folder`, those of eval.json first.

    Raises ValueError for an invalid file.
    """
    paths = sorted(folder.glob("*_focus.json"), key=lambda p: (p.name != "eval_focus.json", p.name))
    found = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
            found.append(FocusMaps(path, str(content["model"]), content["maps"][:MOST_MAPS]))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path} is not a file of focus maps: evaluate again, or remove it"
            ) from None
    return found
