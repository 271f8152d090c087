"""A tree on disk: append-only files, read through memory maps, and a small header that says how
much of them counts.

    tree/header.json   format, number of committed tokens, shape, hashes of the networks that made
                       it; replaced whole
    tree/tokens        int32 [T], in the byte order of the machine, as all numbers
    tree/gists.1 ...   gists of a level, [n_l, D] in the model's dtype
    tree/index.1 ...   index vectors of a level, float32 [n_l, I]
    tree/lock          there while a process has the tree open

The number of tokens says how many rows every file has, so the header is all that a commit replaces,
after all files are flushed to disk: whenever the process or the machine dies, the header tells of
data that is there, and what lies behind it was never committed and is cut off at the next opening.
Nothing that the header counts is ever written again; `truncate` below the committed tokens replaces
the header first.

Legend: T tokens, D width of gists, I width of index vectors, n_l nodes at level l, L coarsest
level. Source: docs/inference.md, "Inference".
"""

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mc_ds.config.errors import ConfigError
from mc_ds.inference.tree.nets import TreeNets, TreeShape
from mc_ds.inference.tree.ram import RamTree
from mc_ds.inference.tree.rows import FileRows
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.storage import Lock, LockHeldError, remove_leftovers, replace_text, sync_folder

FORMAT = 1
HEADER, LOCK = "header.json", "lock"
COMMIT_TOKENS = 2**18
"""Tokens after which a tree commits by itself while it grows."""

OWN_NAMES = (HEADER, LOCK, "tokens", "gists.", "index.")
"""How the names of a tree's files start."""
NAMES = {
    "gistnet": "GistNet",
    "index": "the index",
    "dim": "gists of width",
    "index_width": "index vectors of width",
    "dtype": "gists in",
}
"""What header fields are called in errors, where their own name would not do."""

REMEDY = "restore it from a copy, or ingest into a new folder"
Header = dict[str, Any]


class DiskTree(MegaContextTree):
    """A MegaContextTree in a folder, which one process at a time has open.

    Opening makes the folder where it is missing. Raises ConfigError for a tree that other networks,
    another shape or a newer version made, that is damaged, or that a process has open; OSError
    where the disk is full or fails.
    """

    def __init__(
        self,
        folder: Path | str,
        nets: TreeNets,
        *,
        gistnet_hash: str,
        index_hash: str,
        commit_tokens: int = COMMIT_TOKENS,
        batch_tokens: int | None = None,
    ) -> None:
        """The hashes identify the weights that decide gists and index vectors, as a bundle's
        manifest has them.
        """
        self.folder, self._commit_tokens = Path(folder), commit_tokens
        self._identity = identity(nets.shape, gistnet_hash, index_hash)
        self._lock = open_folder(self.folder)
        self._files: list[FileRows] = []
        self._unsynced = ""
        try:
            header = read_header(self.folder, self._identity)
            self._committed: int = header["tokens"] if header else 0
            self._open_files(nets.shape)
            if header is None:
                self._write_header(0)
                sync_folder(self.folder.absolute().parent)
            levels = nets.shape.max_lod
            super().__init__(
                nets,
                self._files[0],
                [*self._files[1 : 1 + levels]],
                [*self._files[1 + levels :]],
                count=self._committed,
                batch_tokens=batch_tokens,
            )
        except BaseException:
            self._release()
            raise

    @property
    def committed(self) -> int:
        """Tokens that a reopened tree will have, whatever happens to this process."""
        return self._committed

    def commit(self) -> None:
        """Makes all tokens so far durable. Raises OSError where that fails: the tree then keeps
        what was committed before.
        """
        if self._closed or len(self) == self._committed:
            return
        with self._named_errors():
            self._write_pending()
            self._sync()
            self._write_header(len(self))

    def append(self, tokens: Any) -> None:
        """Adds tokens (see MegaContextTree); commits by itself every `commit_tokens`, at the end of
        a batch.
        """
        with self._named_errors():
            super().append(tokens)

    def truncate(self, count: int) -> None:
        """Drops all tokens from `count` on; where they were committed, durably."""
        if 0 <= count < self._committed:
            with self._named_errors():
                self._write_header(count)
        super().truncate(count)

    def _after_batch(self) -> None:
        if self._whole - self._committed >= self._commit_tokens:
            self.commit()

    def _sync(self) -> None:
        """Flushes all files. Once that has failed nobody knows what is on disk: the tree can then
        be read but no more committed.
        """
        if self._unsynced:
            raise OSError(
                errno.EIO,
                f"an earlier flush failed ({self._unsynced}); open the tree again",
                str(self.folder),
            )
        try:
            for rows in self._files:
                rows.sync()
        except OSError as error:
            self._unsynced = error.strerror or str(error)
            raise

    def _write_header(self, count: int) -> None:
        replace_text(
            self.folder / HEADER,
            json.dumps({"format": FORMAT, "tokens": count, **self._identity}, indent=1) + "\n",
        )
        self._committed = count

    def _open_files(self, shape: TreeShape) -> None:
        """Opens and checks all files: tokens, gists of every level, index vectors of every level.
        Cuts off what was never committed.
        """
        remove_leftovers(self.folder, HEADER)
        for name, level, width, dtype in file_layout(shape):
            rows, path = self._committed // shape.span(level), self.folder / name
            needed, size = (
                rows * width * dtype.itemsize,
                path.stat().st_size if path.exists() else 0,
            )
            if size < needed:
                raise ConfigError(
                    f"the tree {self.folder} is damaged: {name} has {size} bytes, "
                    f"{self._committed} tokens need {needed}; {REMEDY}"
                )
            self._files.append(FileRows(path, width, dtype))
            self._files[-1].cut(rows)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Says of a disk that is full or fails what is safe."""
        try:
            yield
        except OSError as error:
            if error.filename == str(self.folder):  # said already
                raise
            said = error.strerror or str(error)
            raise OSError(
                error.errno or errno.EIO,
                f"{said}; the tree keeps its {self._committed} committed tokens",
                str(self.folder),
            ) from error

    def _release(self) -> None:
        super()._release()
        for rows in self._files:
            rows.close()
        self._lock.release()


def file_layout(shape: TreeShape) -> list[tuple[str, int, int, torch.dtype]]:
    """Name, level, width and dtype of every file of rows."""
    levels = range(1, shape.max_lod + 1)
    return [
        ("tokens", 0, 1, torch.int32),
        *((f"gists.{level}", level, shape.dim, shape.dtype) for level in levels),
        *((f"index.{level}", level, shape.index_width, torch.float32) for level in levels),
    ]


def identity(shape: TreeShape, gistnet_hash: str, index_hash: str) -> Header:
    """What a header must say for a tree to be read with these networks."""
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


def open_folder(folder: Path) -> Lock:
    """Makes the folder where it is missing and locks it. Raises ConfigError where it is no tree, or
    open already.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: a tree needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    strange = sorted(path.name for path in folder.iterdir() if not path.name.startswith(OWN_NAMES))
    if strange and not (folder / HEADER).exists():
        raise ConfigError(
            f"{folder} is not a tree, it holds {strange[0]}: give a new or empty folder"
        )
    return lock_tree(folder)


def lock_tree(folder: Path) -> Lock:
    """Locks the tree in `folder` against all other openers. Raises ConfigError where it is open,
    in this or another process.
    """
    try:
        return Lock(folder / LOCK)
    except LockHeldError as held:
        raise ConfigError(
            f"the tree {folder} is already open, in {held.owner}: close it there first"
        ) from None
    except OSError as error:
        raise ConfigError(f"the tree {folder} cannot be locked ({error.strerror})") from None


def read_header(folder: Path, wanted: Header) -> Header | None:
    """The header of the tree in `folder`, None where there is none yet. Raises ConfigError for one
    that is damaged or not as `wanted`.
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
        header = json.loads(path.read_bytes())
        made_by, tokens = header["format"], header["tokens"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged: {REMEDY}") from None
    if made_by != FORMAT:
        raise ConfigError(
            f"the tree {folder} has format {made_by}, this version reads {FORMAT}: use a version "
            f"of mc_ds that knows it"
        )
    if type(tokens) is not int or tokens < 0:
        raise ConfigError(f"{path} is damaged, tokens = {tokens!r}: {REMEDY}")
    for key, value in wanted.items():
        if header.get(key) != value:
            raise ConfigError(
                f"the tree {folder} was made with {NAMES.get(key, key)} {_short(header.get(key))}, "
                f"this model has {_short(value)}: "
                "open it with the bundle that made it, or ingest into a new folder"
            )
    return header


def _short(value: object) -> str:
    return f"{value:.12}" if isinstance(value, str) else str(value)


def open_tree(
    where: str | Path,
    nets: TreeNets,
    *,
    gistnet_hash: str,
    index_hash: str,
    batch_tokens: int | None = None,
) -> MegaContextTree:
    """A new tree in memory for "ram", else the tree in that folder, made where it is missing."""
    if str(where) == "ram":
        return RamTree(nets, batch_tokens=batch_tokens)
    return DiskTree(
        where, nets, gistnet_hash=gistnet_hash, index_hash=index_hash, batch_tokens=batch_tokens
    )
