"""Recognises a repeated command, so that it resumes the run instead of starting over.

A requeued job repeats its command. If that has `--resume never`, or the path of another run's
checkpoint, the repetition must resume from the run's own checkpoints. Therefore checkpoints contain
the settings of the run's first start.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mc_ds.config import ConfigError, RunConfig
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.checkpoint.trainer import read_trainer


def beginning(config: RunConfig) -> dict[str, str]:
    """Return the facts to store about a first start with `config`: its `resume`, and a digest of
    all settings.
    """
    content = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {"resume": config.resume, "config": hashlib.sha256(content.encode()).hexdigest()}


def last_beginning(checkpoints: Path) -> dict[str, Any] | None:
    """Return the stored facts about the first start of the run with these checkpoints; None if
    there are none.
    """
    for checkpoint in all_checkpoints(checkpoints):
        try:
            return read_trainer(checkpoint).get("first_start")
        except ConfigError:  # damaged; an earlier checkpoint has the same facts
            continue
    return None


def repeats(mine: dict[str, str], first: dict[str, Any]) -> bool:
    """Return whether a start (`mine`) repeats the run's first one.

    If `resume` is a path, only that must be equal; if it is `never`, all settings must be equal.
    """
    if mine["resume"] == "auto":
        return False
    return mine == first if mine["resume"] == "never" else mine["resume"] == first["resume"]
