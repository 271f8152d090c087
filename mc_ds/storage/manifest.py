"""The manifest of a folder, `manifest.json`: size and SHA-256 of every file, and further facts
about the folder.
"""

import json
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from mc_ds.storage.files import FileFacts, fingerprint, replace_text
from mc_ds.storage.names import is_name
from mc_ds.storage.reading import read_json_bytes, reason

MANIFEST = "manifest.json"
READERS = 4
"""Number of files that are hashed concurrently."""


def write_manifest(folder: Path, files: Mapping[str, FileFacts], **facts: Any) -> None:
    """Write the manifest, which marks the folder as complete. `files` are keyed by their paths
    below it; `facts` become fields before the list of files.
    """
    listed = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}
    content = {**facts, "files": dict(sorted(listed.items()))}
    replace_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """Return size and hash of each file by its path. Raises ValueError, in one line, if the
    manifest is missing or damaged.
    """
    try:
        content = json.loads(read_json_bytes(folder / MANIFEST).decode())["files"]
        files = {
            name: FileFacts(int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in content.items()
        }
    except OSError as error:
        raise ValueError(f"no readable {MANIFEST}: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or not is_name(name):
            raise ValueError(f"{MANIFEST} is damaged: {name!r} is not a file of the folder")
    return files


def is_complete(folder: Path) -> bool:
    """Return whether every file in the manifest exists with the right size. Does not read the
    files.
    """
    return damage(folder, read=False) is None


def damage(folder: Path, share: int = 0, shares: int = 1, *, read: bool = True) -> str | None:
    """Return what is wrong with the files of `folder`, or None if nothing is.

    Every `shares`-th file, starting at number `share`, is read and hashed, so that several
    processes can divide the work. With `read=False` only sizes are compared.
    """
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    mine = list(files.items())[share::shares]
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda item: _damage(folder / item[0], item[1], read=read), mine)
        return next((problem for problem in found if problem is not None), None)


def foreign_files(folder: Path, ours: Iterable[str] = ()) -> list[str]:
    """Return the files, links and empty folders in `folder` that are neither in its manifest nor in
    `ours`.

    `ours` are paths below it; a path that ends in "/" includes everything below. Without a manifest
    everything outside `ours` is foreign.
    """
    ours = set(ours)
    with suppress(ValueError):
        ours |= {MANIFEST, *read_manifest(folder)}
    below = tuple(name for name in ours if name.endswith("/"))
    names = (
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    )
    return [name for name in names if name not in ours and not f"{name}/".startswith(below)]


def _damage(path: Path, expected: FileFacts, *, read: bool) -> str | None:
    """Return what is wrong with one file, or None if nothing is."""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            return f"{path.name} is a link, not a file (copy the folder with cp -L)"
        if not stat.S_ISREG(status.st_mode):
            return f"{path.name} is not a regular file"
        if status.st_size != expected.bytes:
            return f"{path.name} has {status.st_size} bytes, the manifest says {expected.bytes}"
        if read and fingerprint(path) != expected:
            return f"{path.name} does not have the SHA-256 of the manifest"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {reason(error)}"
    return None
