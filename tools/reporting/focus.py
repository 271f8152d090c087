"""Focus maps that `launch/evaluate.py --show_focus` wrote beside its records."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_MAPS = 4
"""Maps that a page shows of one file: each holds a whole text."""


@dataclass(frozen=True)
class FocusMaps:
    """What one file holds."""

    path: Path
    model: str
    maps: Sequence[dict[str, Any]]


def read_focus_maps(folder: Path) -> list[FocusMaps]:
    """Read the maps of every `*_focus.json` in `folder`, those of eval.json first.

    Raises ValueError for a file that evaluate.py did not write.
    """
    paths = sorted(folder.glob("*_focus.json"), key=lambda p: (p.name != "eval_focus.json", p.name))
    found = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
            found.append(FocusMaps(path, str(content["model"]), content["maps"][:MOST_MAPS]))
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} holds no focus maps: evaluate again, or remove it") from None
    return found
