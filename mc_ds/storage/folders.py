"""Publishes complete folders, replaces existing ones, and recovers after a crash.

A folder is written beside its target under a unique name, flushed, and renamed. An existing target
is exchanged with it atomically (`renameat2`), so that the name always refers to the old or the new
folder. File systems without this call (NFS, some Lustre) need two steps: the old folder becomes
`NAME.replaced-...`, then the new one takes the name. A process that dies in between leaves the old
folder intact, and `recover`, which every opener calls, gives it its name back.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.storage.files import sync_file, sync_folder
from mc_ds.storage.locks import Lock, LockHeldError
from mc_ds.storage.names import temporaries, temporary

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


class StagedFolder:
    """A new folder at `path`, which `publish` renames to `target`. A context manager: a folder that
    was not published when it ends is removed.

    `TARGET.lock` keeps other processes from writing to the same target; pass `lock=False` where the
    caller does. What a killed writer left is removed. Raises ConfigError (LockHeldError) where
    another process is writing there, OSError where writing fails.
    """

    def __init__(self, target: Path, *, lock: bool = True) -> None:
        self.target = Path(os.path.realpath(target))
        self.path = temporary(self.target, "partial")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_target(self.target) if lock else None
        try:
            remove_leftovers(self.target.parent, self.target.name)
            self.path.mkdir()
        except BaseException:
            self._release()
            raise

    def publish(
        self, *, replaces: Callable[[Path], None] | None = None, files_are_synced: bool = False
    ) -> Path:
        """Flush the folder to disk, rename it to `target` and return that path.

        An existing folder is replaced if `replaces` returns for its path; `replaces` raises
        ConfigError for one that must stay. Without `replaces` every existing folder stays. With
        `files_are_synced` only folders and names are flushed.
        """
        if self._lock is not None:
            self._lock.check()
        _sync_below(self.path, files=not files_are_synced)
        while not self._rename(replaces):
            pass
        sync_folder(self.target.parent)
        remove_leftovers(self.target.parent, self.target.name)
        self._release()
        return self.target

    def _rename(self, replaces: Callable[[Path], None] | None) -> bool:
        """Try to rename the folder to its target; return False where the target appeared or
        disappeared meanwhile.
        """
        if os.path.lexists(self.target):
            if replaces is None:
                raise ConfigError(f"{self.target} exists: give another name, or remove it")
            replaces(self.target)
            return _exchange(self.path, self.target) or _replace(self.path, self.target)
        try:
            os.rename(self.path, self.target)
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
            return False
        return True

    def discard(self) -> None:
        """Remove the folder unless it was published."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "StagedFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


def _lock_target(target: Path) -> Lock:
    try:
        return Lock(target.with_name(f"{target.name}.lock"))
    except LockHeldError as held:
        raise LockHeldError(target, held.owner) from None


def recover(target: Path) -> None:
    """Undo a replacement that a writer began before it died: give the old folder its name back.
    Openers call this first.
    """
    target = Path(os.path.realpath(target))
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for replaced, _ in temporaries(target.parent, "replaced", target.name):
        try:
            os.rename(replaced, target)
        except FileNotFoundError:  # another process was faster
            return
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        sync_folder(target.parent)
        return


def recover_all(folder: Path) -> None:
    """Call `recover` for everything in `folder` that needs it."""
    if folder.is_dir():
        for _, target in temporaries(folder, "replaced"):
            recover(target)


def remove_folder(path: Path) -> None:
    """Remove a folder with its content. It is renamed first, so that no partly removed folder ever
    has its name.
    """
    _remove_as(path, path)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in `folder`, for the entry `name` or for any. The caller must
    be the only writer there.

    What cannot be removed, such as a file that a reader has open over NFS, is left for the next
    call.
    """
    for replaced, target in temporaries(folder, "replaced", name):
        if os.path.lexists(target):
            _remove_as(target, replaced)
        else:
            recover(target)
    for partial, _ in temporaries(folder, "partial", name):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _remove_as(target: Path, folder: Path) -> None:
    """Rename `folder` to a temporary, incomplete entry of `target`, and remove it."""
    doomed = temporary(target, "partial")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _replace(new: Path, target: Path) -> bool:
    """Rename the old folder, then the new one to its name. Return False where a reader recovered
    the old one in between.
    """
    replaced = temporary(target, "replaced")
    os.rename(target, replaced)
    sync_folder(target.parent)
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno in _OCCUPIED:
            return False
        os.rename(replaced, target)
        raise
    return True


def _exchange(new: Path, old: Path) -> bool:
    """Exchange two names atomically; return False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(old))


def _sync_below(folder: Path, *, files: bool) -> None:
    """Flush all folders from the leaves up to `folder`, and their files too if `files` is set."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names if files else ():
            sync_file(Path(place, name))
        sync_folder(Path(place))
