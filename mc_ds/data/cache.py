"""Cache folders that several processes need and one of them makes."""

import time
from collections.abc import Callable
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.storage import LockHeldError, StagedFolder, reason

POLL_S = 0.5
"""Seconds between checks for a folder that another process is making."""


def make_once(folder: Path, build: Callable[[StagedFolder], None]) -> None:
    """Call `build` to make and publish the cache folder `folder` if it does not exist.

    If another process is already making it, wait for that. Raises ConfigError if the cache cannot
    be written.
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
                " writable folder"
            ) from None
        with staged:
            if not folder.exists():  # another process may have finished it before the lock was free
                build(staged)
