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
"""Suffix of a checkpoint converted for another number of ranks or another ZeRO stage; removed by
the next save.
"""
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointRemovedError(ConfigError):
    """The run removed this checkpoint while it was being read."""

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
    """Return all paths with a checkpoint's name, including damaged ones, newest first."""
    recover_all(folder)
    found = [
        (int(match[1]), path)
        for path in folder.glob("step_*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run whose files all have the size in the manifest, newest
    first.
    """
    return [path for path in all_checkpoints(folder) if is_complete(path)]


def publish(staged: StagedFolder) -> None:
    """Rename a complete checkpoint to its final name, replacing any folder there, and write the
    name to `latest`.
    """
    final = staged.publish(replaces=lambda path: None, files_are_synced=True)
    replace_text(final.parent / "latest", f"{final.name}\n")


def remove_surplus(newest: Path, *, keep_last: int, keep_every: int) -> None:
    """Remove the checkpoints that are no longer kept, now that `newest` is complete.

    Of the checkpoints up to `newest`, the last `keep_last` and those whose step is a multiple of
    `keep_every` (0: none) are kept. Checkpoints of later steps are removed: they belong to an
    abandoned run, and resuming must not find them. Leftovers of killed saves are removed too.
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
