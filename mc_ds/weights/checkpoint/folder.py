"""The folder of a run's checkpoints: names, order, and which are kept. Only rank 0 changes it."""

import re
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.storage import (
    StagedFolder,
    is_complete,
    recover_all,
    remove_folder,
    remove_leftovers,
    replace_text,
)

CONVERTED = ".universal"
"""Suffix of a checkpoint converted for another number of ranks or another ZeRO stage. The next save
removes it.
"""
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointRemovedError(ConfigError):
    """A checkpoint that its run removed while it was being read."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(
            f"{checkpoint} was removed by its run while it was read (checkpoint.keep_last): try"
            " again, or copy a checkpoint first"
        )
        self.checkpoint = checkpoint


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Return the number of optimizer steps before the checkpoint with this name."""
    return int(path.name.removeprefix("step_"))


def all_checkpoints(folder: Path) -> list[Path]:
    """Return all paths with a checkpoint's name, newest first, damaged ones included."""
    recover_all(folder)
    found = [
        (int(match[1]), path)
        for path in folder.glob("step_*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first, of which every file has the size in its
    manifest.
    """
    return [path for path in all_checkpoints(folder) if is_complete(path)]


def publish(staged: StagedFolder) -> None:
    """Give a complete checkpoint its name, replacing whatever has it, and write the name to
    `latest`.
    """
    final = staged.publish(replaces=lambda path: None, files_are_synced=True)
    replace_text(final.parent / "latest", f"{final.name}\n")


def remove_surplus(newest: Path, *, keep_last: int, keep_every: int) -> None:
    """Remove the checkpoints that are no longer kept, now that `newest` is complete.

    Kept are the last `keep_last` complete checkpoints up to it and those whose step is a multiple
    of `keep_every` (0: none). Checkpoints of later steps are removed: they belong to a run that
    this one does not continue, and resuming must not find them. So are the leftovers of killed
    saves.
    """
    folder = newest.parent
    upto = [path for path in list_checkpoints(folder) if path.name <= newest.name]
    kept = {
        *upto[:keep_last],
        *(path for path in upto if keep_every and checkpoint_step(path) % keep_every == 0),
    }
    remove_leftovers(folder)
    converted = folder.glob(f"step_*{CONVERTED}")
    for path in (*converted, *(path for path in all_checkpoints(folder) if path not in kept)):
        remove_folder(path)
