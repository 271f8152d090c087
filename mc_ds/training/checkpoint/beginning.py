"""What a run was asked for when it first started, kept in its checkpoints: the same command again
goes on.

A job that is requeued gets the command of its first attempt. `--resume never` or the path of
another run's checkpoint in it must not throw away what that attempt has done.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mc_ds.config import ConfigError, RunConfig
from mc_ds.weights.checkpoint.folder import all_checkpoints
from mc_ds.weights.checkpoint.trainer import read_trainer


def beginning(config: RunConfig) -> dict[str, str]:
    """Return what `config` asks for at a first start: where to resume from, and a digest of all
    settings."""
    content = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {"resume": config.resume, "config": hashlib.sha256(content.encode()).hexdigest()}


def last_beginning(checkpoints: Path) -> dict[str, Any] | None:
    """Return how the run of the newest checkpoint in a folder first started; None where none says
    so."""
    for checkpoint in all_checkpoints(checkpoints):
        try:
            return read_trainer(checkpoint).get("first_start")
        except ConfigError:  # damaged: one before it says the same
            continue
    return None


def repeats(mine: dict[str, str], first: dict[str, Any]) -> bool:
    """Return whether a start is the run's first command again.

    For a path that is so where it is the same path: the checkpoints go on from it. Another run that
    starts over with `never` is told by any other setting.
    """
    if mine["resume"] == "auto":
        return False
    return mine == first if mine["resume"] == "never" else mine["resume"] == first["resume"]
