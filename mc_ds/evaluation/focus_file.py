"""Save focus maps to a file: texts, contexts and LensNet's scores of some sequences, from which
`tools/report.py` makes pages.

Legend: T tokens, W entries, h horizon.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_ds.evaluation.views import Focus, ScoredContext
from mc_ds.storage import replace_text

DIGITS = 4
"""Decimal places of the saved scores."""


def save_focus_maps(foci: Sequence[Focus], model: str, path: Path) -> Path:
    """Write `foci` as JSON, with the name of the `model` that chose the contexts; return the path.

    A map holds its sequence's `pieces` (the text of each of the T + 1 tokens) and, for each policy,
    `contexts`: those scored in the rounds of focus, then the final one. A context is `first`, the
    token at which it begins, and `lods` of its W adjacent entries. `scores` are those of its first
    W - h entries, null where not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": model, "maps": [_map(focus) for focus in foci]}
    replace_text(path, json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")
    return path


def _map(focus: Focus) -> dict[str, Any]:
    sample = focus.sample
    return {
        "title": focus.title,
        "block_size": focus.geometry.block_size,
        "known": focus.known,
        "pieces": list(focus.pieces),
        "spans": sample.spans.tolist(),
        "not_asked": sample.distractors.tolist(),
        "contexts": {
            policy: [
                *(_scored(scored) for scored in focus.rounds.get(policy, ())),
                _context(*plan),
            ]
            for policy, plan in focus.contexts.items()
        },
    }


def _context(lods: NDArray[np.int64], starts: NDArray[np.int64]) -> dict[str, Any]:
    return {"first": int(starts[0]), "lods": lods.tolist()}


def _scored(scored: ScoredContext) -> dict[str, Any]:
    scores = [
        round(score, DIGITS) if math.isfinite(score) else None for score in scored.scores.tolist()
    ]
    return {**_context(scored.lods, scored.starts), "scores": scores}
