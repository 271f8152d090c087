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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mc_ds.config.errors import ConfigError
from mc_ds.inference.tree.folder import (
    FORMAT,
    HEADER,
    REMEDY,
    file_layout,
    identity,
    open_folder,
    read_header,
)
from mc_ds.inference.tree.nets import TreeNets, TreeShape
from mc_ds.inference.tree.ram import RamTree
from mc_ds.inference.tree.rows import FileRows
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.storage import remove_leftovers, replace_text, sync_folder

COMMIT_TOKENS = 2**18
"""Tokens after which a tree commits by itself while it grows."""


class DiskTree(MegaContextTree):
    """A MegaContextTree in a folder, which one process at a time has open.

    Opening makes the folder where it is missing. A folder that cannot be written is opened to be
    read, as it was last committed, whoever has it open elsewhere. Raises ConfigError for a tree
    that other networks, another shape or a newer version made, that is damaged, or that a
    process has open; OSError where the disk is full or fails.
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
        create: bool = True,
    ) -> None:
        """The hashes identify the weights that decide gists and index vectors, as a bundle's
        manifest has them. Without `create` there must be a tree.
        """
        self.folder, self._commit_tokens = Path(folder), commit_tokens
        self._identity = identity(nets.shape, gistnet_hash, index_hash)
        self._lock = open_folder(self.folder, create=create)
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
    def read_only(self) -> bool:
        """Whether nothing can be added or taken away."""
        return self._lock is None

    @property
    def committed(self) -> int:
        """Tokens that a reopened tree will have, whatever happens to this process."""
        return self._committed

    def commit(self) -> None:
        """Make all tokens so far durable. Raises OSError where that fails: the tree then keeps what
        was committed before.
        """
        if self._closed or len(self) == self._committed:
            return
        with self._named_errors():
            self._write_pending()
            self._sync()
            self._write_header(len(self))

    def append(self, tokens: Any) -> None:
        """Add tokens (see MegaContextTree); commits by itself every `commit_tokens`, at the end of
        a batch.
        """
        with self._named_errors():
            super().append(tokens)

    def _before_cut(self, count: int) -> None:
        """Where committed tokens go, the header says so first."""
        if count < self._committed:
            with self._named_errors():
                self._write_header(count)

    def _require_writable(self) -> None:
        super()._require_writable()
        if self.read_only:
            raise ConfigError(
                f"the tree {self.folder} can only be read: copy it to where it can be written"
            )

    def _after_batch(self) -> None:
        if self._whole - self._committed >= self._commit_tokens:
            self.commit()

    def _sync(self) -> None:
        """Flush all files. Once that has failed nobody knows what is on disk: the tree can then be
        read but no more committed.
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
        """Open and check all files: tokens, gists of every level, index vectors of every level.
        Cuts off what was never committed.
        """
        if not self.read_only:
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
            self._files.append(FileRows(path, width, dtype, writable=not self.read_only))
            if not self.read_only:
                self._files[-1].cut(rows)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say of a disk that is full or fails what is safe."""
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
        if self._lock is not None:
            self._lock.release()


def open_tree(
    where: str | Path,
    nets: TreeNets,
    *,
    gistnet_hash: str,
    index_hash: str,
    batch_tokens: int | None = None,
    create: bool = True,
) -> MegaContextTree:
    """Return a new tree in memory for "ram", else the tree in that folder, made where it is missing
    and `create` says so.
    """
    if str(where) == "ram":
        return RamTree(nets, batch_tokens=batch_tokens)
    return DiskTree(
        where,
        nets,
        gistnet_hash=gistnet_hash,
        index_hash=index_hash,
        batch_tokens=batch_tokens,
        create=create,
    )
