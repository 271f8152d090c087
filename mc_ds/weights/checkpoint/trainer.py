"""`trainer.json`: facts about the run that wrote a checkpoint. Training writes the file; only this
module reads it.
"""

from pathlib import Path
from typing import Any

from mc_ds.config import ConfigError
from mc_ds.storage import read_json

TRAINER = "trainer.json"
REQUIRED = (
    *("step", "world_size", "zero_stage", "sub_group_size"),
    *("config", "requirements", "corpus"),
)


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """Read `trainer.json` of a checkpoint. Raises ConfigError, in one line, if it is missing,
    damaged or from another version.
    """
    path = checkpoint / TRAINER
    content = read_json(path, remedy="restore it, or name another checkpoint")
    if missing := [name for name in REQUIRED if name not in content]:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}: use a checkpoint of this version of mc_ds"
        )
    return content
