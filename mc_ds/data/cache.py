"""Folders that several processes need and one of them makes."""

import time
from collections.abc import Callable
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.storage import LockHeldError, StagedFolder, reason

POLL_S = 0.5
"""Seconds between looks at a folder that another process is making."""


def make_once(folder: Path, build: Callable[[StagedFolder], None]) -> None:
    """Make the folder of a data cache with `build`, which publishes it, unless it is there; where
    another process is making it, wait.

    Raises ConfigError where nothing can be written there.
    """
    while not folder.exists():
        try:
            staged = StagedFolder(folder)
        except LockHeldError:
            time.sleep(POLL_S)
            continue
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir = {folder.parent} cannot be written ({reason(error)}): give a"
                " folder that can"
            ) from None
        with staged:
            if not folder.exists():  # else it was finished between the look and the lock
                build(staged)
