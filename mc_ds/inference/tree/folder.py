"""The folder of a tree on disk: its files, its header, and its lock.

Legend: T tokens, n_l nodes at level l.
"""

import errno
import json
import stat
import sys
import zlib
from pathlib import Path
from typing import Any

import torch

from mc_ds.config.errors import ConfigError
from mc_ds.inference.tree.nets import TreeShape
from mc_ds.storage import Lock, LockHeldError, read_json_bytes

FORMAT = 2
HEADER, LOCK = "header.json", "lock"
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a folder that can be read but not written."""
OWN_NAMES = (HEADER, LOCK, "tokens", "gists.", "index.")
"""Prefixes of the names of a tree's files."""
NAMES = {
    "gistnet": "GistNet",
    "index": "the index",
    "dim": "gists of width",
    "index_width": "index vectors of width",
    "dtype": "gists in",
}
"""How error messages name header fields; other fields go by their own name."""

REMEDY = "restore it from a copy, or ingest into a new folder"
Header = dict[str, Any]


def sums_name(name: str) -> str:
    """Return the name of the file with the checksums of the file `name`."""
    return f"{name}.sums"


def file_layout(shape: TreeShape) -> list[tuple[str, int, int, torch.dtype]]:
    """Return (name, level, width, dtype) of every file of rows."""
    levels = range(1, shape.max_lod + 1)
    return [
        ("tokens", 0, 1, torch.int32),
        *((f"gists.{level}", level, shape.dim, shape.dtype) for level in levels),
        *((f"index.{level}", level, shape.index_width, torch.float32) for level in levels),
    ]


def identity(shape: TreeShape, gistnet_hash: str, index_hash: str) -> Header:
    """Return the header fields that must match for a tree to be read with these networks."""
    return {
        "byte_order": sys.byteorder,
        "block_size": shape.block_size,
        "max_lod": shape.max_lod,
        "dim": shape.dim,
        "index_width": shape.index_width,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "gistnet": gistnet_hash,
        "index": index_hash,
    }


def open_folder(folder: Path, *, create: bool) -> Lock | None:
    """Lock the folder of a tree, creating it if it is missing and `create` is set; return None if
    it is read-only. Raises ConfigError if it holds no tree, or the tree is already open.
    """
    if not create and not (folder / HEADER).exists():
        raise ConfigError(f"{folder} holds no tree: restore it from a copy")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give a folder for the tree")
    folder.mkdir(parents=True, exist_ok=True)
    _check_files(folder)
    foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith(OWN_NAMES))
    if foreign and not (folder / HEADER).exists():
        raise ConfigError(
            f"{folder} is not a tree (it holds {foreign[0]}): give a new or empty folder"
        )
    try:
        return _lock(folder)
    except OSError as error:
        if error.errno in READ_ONLY and (folder / HEADER).exists():
            return None
        raise ConfigError(
            f"the tree {folder} cannot be locked ({error.strerror}): check its file system"
        ) from None


def _check_files(folder: Path) -> None:
    """Raise ConfigError if a file of the tree is not a regular file. A link could refer to any file
    of the machine.
    """
    for path in folder.iterdir():
        try:
            is_regular = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:  # a temporary file of another process
            continue
        if path.name.startswith(OWN_NAMES) and not is_regular:
            raise ConfigError(
                f"the tree {folder} is damaged: {path.name} is not a regular file; {REMEDY}"
            )


def lock_tree(folder: Path) -> Lock:
    """Lock the tree in `folder` against all other openers. Raises ConfigError if it is open, in
    this or another process.
    """
    try:
        return _lock(folder)
    except OSError as error:
        raise ConfigError(
            f"the tree {folder} cannot be locked ({error.strerror}): check its file system"
        ) from None


def _lock(folder: Path) -> Lock:
    try:
        return Lock(folder / LOCK)
    except LockHeldError as held:
        raise ConfigError(
            f"the tree {folder} is already open in {held.owner}: close it there first"
        ) from None


def header_text(header: Header) -> str:
    """Return the text of the header file, with its checksum."""
    return json.dumps({**header, "crc32": _crc32(header)}, indent=1) + "\n"


def _crc32(header: Header) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def read_header(folder: Path, wanted: Header) -> Header | None:
    """Return the header of the tree in `folder`, or None if it has none yet. Raises ConfigError if
    it is damaged or differs from `wanted`.
    """
    path = folder / HEADER
    if not path.exists():
        for data in folder.iterdir():
            if not data.name.startswith((LOCK, HEADER)) and data.stat().st_size:
                raise ConfigError(
                    f"the tree {folder} is damaged: {data.name} holds data but {HEADER} is "
                    f"missing; {REMEDY}"
                )
        return None
    try:
        header = json.loads(read_json_bytes(path))
        made_by, tokens = header["format"], header["tokens"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{path} is damaged: it is not a tree's header; {REMEDY}") from None
    if made_by != FORMAT:
        raise ConfigError(
            f"the tree {folder} has format {made_by}, but this version of mc_ds reads {FORMAT}: "
            "use the version that wrote it"
        )
    if header.pop("crc32", None) != _crc32(header):
        raise ConfigError(f"{path} is damaged: its checksum does not match; {REMEDY}")
    tails = header.get("tails")
    if not isinstance(tails, dict) or any(type(tail) is not int for tail in tails.values()):
        raise ConfigError(f"{path} is damaged: tails = {tails!r} are not checksums; {REMEDY}")
    if type(tokens) is not int or tokens < 0:
        raise ConfigError(f"{path} is damaged: tokens = {tokens!r} is not a count; {REMEDY}")
    for key, value in wanted.items():
        if header.get(key) != value:
            raise ConfigError(
                f"the tree {folder} was made with {NAMES.get(key, key)} {_short(header.get(key))}, "
                f"but this model has {_short(value)}: "
                "open it with the bundle that made it, or ingest into a new folder"
            )
    return header


def _short(value: object) -> str:
    return f"{value:.12}" if isinstance(value, str) else str(value)
