"""A tree on disk: append-only files, read through memory maps, and a small header with the number
of committed tokens.

    tree/header.json   format, number of committed tokens, shape, hashes of the networks that made
                       it, checksums of itself and of the tail of every file; replaced atomically
    tree/tokens        int32 [T]; all numbers are in the byte order of the machine
    tree/gists.1 ...   gists of a level, [n_l, D] in the model's dtype
    tree/index.1 ...   index vectors of a level, float32 [n_l, I]
    tree/tokens.sums ... CRC-32 of every whole piece of each of these files (checksums.py)
    tree/lock          exists while a process has the tree open

The number of tokens determines the number of rows of every file. A commit flushes all files and
then replaces the header, so that the header describes durable data even after a crash. Rows beyond
it were never committed and are dropped at the next opening. Committed rows are never overwritten; a
`truncate` below the committed tokens replaces the header first.

Legend: T tokens, D width of gists, I width of index vectors, n_l nodes at level l, L coarsest
level. Source: docs/inference.md, "Inference".
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mc_ds.config.errors import ConfigError
from mc_ds.inference.tree.checksums import sums_bytes
from mc_ds.inference.tree.file_rows import FileRows
from mc_ds.inference.tree.folder import (
    FORMAT,
    HEADER,
    REMEDY,
    file_layout,
    header_text,
    identity,
    open_folder,
    read_header,
    sums_name,
)
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.inference.tree.ram import RamTree
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.storage import remove_leftovers, replace_text, sync_folder

COMMIT_TOKENS = 2**18
"""Number of tokens after which a growing tree is committed automatically."""


class DiskTree(MegaContextTree):
    """A MegaContextTree in a folder. One process at a time can open it for writing.

    Opening creates the folder if it is missing. A folder without write permission is opened
    read-only, as last committed, even while another process has it open. Raises ConfigError if the
    tree was made by other networks, has another shape or a newer format, is damaged, or is already
    open; OSError if the disk is full or fails. Reading damaged rows raises ConfigError too.
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
        """The hashes, from a bundle's manifest, identify the weights that compute gists and index
        vectors. Without `create`, the folder must already hold a tree.
        """
        self.folder, self._commit_tokens = Path(folder), commit_tokens
        self._layout = file_layout(nets.shape)
        self._spans = [nets.shape.span(level) for _, level, *_ in self._layout]
        self._identity = identity(nets.shape, gistnet_hash, index_hash)
        self._lock = open_folder(self.folder, create=create)
        self._files: list[FileRows] = []
        self._unsynced = ""
        try:
            header = read_header(self.folder, self._identity)
            self._committed: int = header["tokens"] if header else 0
            self._open_files(header["tails"] if header else {})
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
        """Whether the tree cannot be changed."""
        return self._lock is None

    @property
    def committed(self) -> int:
        """Number of durable tokens: those that a reopened tree has even if this process is
        killed.
        """
        return self._committed

    def commit(self) -> None:
        """Make all tokens durable. Raises OSError on failure; earlier commits remain valid."""
        if self._closed or len(self) == self._committed:
            return
        with self._named_errors():
            self._write_pending()
            for rows, count in zip(self._files, self._rows_of(len(self)), strict=True):
                rows.store_sums(count)
            self._sync()
            self._write_header(len(self))

    def append(self, tokens: Any) -> None:
        """Add tokens (see MegaContextTree.append). Commits at the end of a batch once
        `commit_tokens` tokens are uncommitted.
        """
        with self._named_errors():
            super().append(tokens)

    def _before_cut(self, count: int) -> None:
        """Replace the header before committed tokens are removed."""
        if count < self._committed:
            with self._named_errors():
                self._write_header(count)

    def _require_writable(self) -> None:
        super()._require_writable()
        if self.read_only:
            raise ConfigError(f"the tree {self.folder} is read-only: copy it to a writable folder")

    def _after_batch(self) -> None:
        if self._whole - self._committed >= self._commit_tokens:
            self.commit()

    def _sync(self) -> None:
        """Flush all files. After a failure the state on disk is unknown: the tree can still be
        read, but no longer committed.
        """
        if self._unsynced:
            raise OSError(
                errno.EIO,
                f"an earlier flush failed ({self._unsynced}): open the tree again",
                str(self.folder),
            )
        try:
            for rows in self._files:
                rows.sync()
        except OSError as error:
            self._unsynced = error.strerror or str(error)
            raise

    def _write_header(self, count: int) -> None:
        tails = {
            name: rows.tail(length)
            for (name, *_), rows, length in zip(
                self._layout, self._files, self._rows_of(count), strict=True
            )
        }
        header = {"format": FORMAT, "tokens": count, **self._identity, "tails": tails}
        replace_text(self.folder / HEADER, header_text(header))
        self._committed = count

    def _rows_of(self, count: int) -> list[int]:
        """Return the number of rows in each file for the first `count` tokens."""
        return [count // span for span in self._spans]

    def _open_files(self, tails: dict[str, int]) -> None:
        """Open and check all files: tokens, gists and index vectors of every level. Drops rows that
        were never committed.
        """
        if not self.read_only:
            remove_leftovers(self.folder, HEADER)
        for (name, _, width, dtype), rows in zip(
            self._layout, self._rows_of(self._committed), strict=True
        ):
            row_bytes = width * dtype.itemsize
            self._require_size(name, rows * row_bytes)
            self._require_size(sums_name(name), sums_bytes(rows, row_bytes))
            file = FileRows(self.folder / name, width, dtype, writable=not self.read_only)
            self._files.append(file)
            file.load(rows, tails.get(name, 0))

    def _require_size(self, name: str, needed: int) -> None:
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        if size < needed:
            raise ConfigError(
                f"the tree {self.folder} is damaged: {name} has {size} bytes, but "
                f"{self._committed} tokens need {needed}; {REMEDY}"
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Add the number of durable tokens to the message of an OSError."""
        try:
            yield
        except OSError as error:
            if error.filename == str(self.folder):  # already added
                raise
            cause = error.strerror or str(error)
            raise OSError(
                error.errno or errno.EIO,
                f"{cause}; the tree keeps its {self._committed} committed tokens",
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
    """Return a new tree in memory if `where` is "ram", else the tree in that folder, which is
    created if it is missing and `create` is set.
    """
    if not isinstance(create, bool):
        raise ConfigError(f"create = {create!r}: use True or False")
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
