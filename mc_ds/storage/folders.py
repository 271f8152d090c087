"""Publish complete folders, replace existing ones, and recover after a crash.

A folder is written beside its target under a unique name, flushed, and renamed. An existing target
is exchanged with it atomically (`renameat2`), so the name always refers to the old or the new
folder. File systems without this call (NFS, some Lustre) need two steps: the old folder is renamed
to `NAME.replaced-...`, then the new one takes the name. A crash in between leaves the old folder
intact, and `recover`, which every opener calls, renames it back.
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
    """A new folder at `path`, which `publish` renames to `target`. As a context manager it removes
    the folder at the end if it was not published.

    `TARGET.lock` keeps other processes from writing to the same target; pass `lock=False` if the
    caller already prevents that. Leftovers of killed writers are removed. Raises ConfigError
    (LockHeldError) if another process is writing to the target, OSError if writing fails.
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
        """Flush the folder to disk, rename it to `target`, and return that path.

        An existing target is passed to `replaces`, which raises ConfigError if it must be kept;
        otherwise it is replaced. Without `replaces`, an existing target raises ConfigError. With
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
        """Try to rename the folder to its target. Return False if the target appeared or
        disappeared meanwhile, so that the caller tries again.
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
        """Remove the folder unless it was published, and release the lock."""
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
    """Undo a replacement that was interrupted by a crash: rename the old folder back. Openers call
    this first.
    """
    target = Path(os.path.realpath(target))
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for replaced, _ in temporaries(target.parent, "replaced", target.name):
        try:
            os.rename(replaced, target)
        except FileNotFoundError:  # another process has recovered it
            return
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        sync_folder(target.parent)
        return


def recover_all(folder: Path) -> None:
    """Call `recover` for every target in `folder` that needs it."""
    if folder.is_dir():
        for _, target in temporaries(folder, "replaced"):
            recover(target)


def remove_folder(path: Path) -> None:
    """Remove a folder with its content. It is renamed first, so that its name never refers to a
    partly removed folder.
    """
    _remove_as(path, path)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in `folder`, for the entry `name` or for all entries. The
    caller must be the only writer.

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
    """Rename `folder` to a temporary name of `target`, and remove it."""
    removed = temporary(target, "partial")
    os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _replace(new: Path, target: Path) -> bool:
    """Rename the old folder away, then the new one to `target`. Return False if a reader recovered
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
    """Exchange two names atomically. Return False if the system or the file system does not support
    it.
    """
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
    """Flush all folders below `folder` and `folder` itself, and their files too if `files` is
    set.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names if files else ():
            sync_file(Path(place, name))
        sync_folder(Path(place))
