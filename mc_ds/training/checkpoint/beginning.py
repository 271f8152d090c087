"""The command of a run's first start, kept in its checkpoints, so that the same command again
resumes the run.

A requeued job gets the command of its first attempt. If that has `--resume never`, or the path of
another run's checkpoint, the second attempt must still continue the first one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mc_ds.config import ConfigError, RunConfig
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.checkpoint.trainer import read_trainer


def beginning(config: RunConfig) -> dict[str, str]:
    """Return the facts of a first start with `config`: what to resume from, and a digest of all
    settings.
    """
    content = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {"resume": config.resume, "config": hashlib.sha256(content.encode()).hexdigest()}


def last_beginning(checkpoints: Path) -> dict[str, Any] | None:
    """Return the facts of the first start of the run whose checkpoints are in a folder; None where
    none are known.
    """
    for checkpoint in all_checkpoints(checkpoints):
        try:
            return read_trainer(checkpoint).get("first_start")
        except ConfigError:  # damaged: an earlier one has the same facts
            continue
    return None


def repeats(mine: dict[str, str], first: dict[str, Any]) -> bool:
    """Return whether a start repeats the run's first command.

    With a path, it does if the path is the same: the run's checkpoints continue from it. With
    `never`, all settings must be the same.
    """
    if mine["resume"] == "auto":
        return False
    return mine == first if mine["resume"] == "never" else mine["resume"] == first["resume"]
