"""`FileRows`: rows in a file, read through a memory map, with their checksums in a file beside
it.
"""

import mmap
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mc_ds.inference.tree.checksums import SUM_BYTES, Checksums
from mc_ds.inference.tree.folder import sums_name


class FileRows:
    """Rows of numbers in a file, in the byte order of the machine, without a header.

    Writing goes through the file, reading through a memory map. The map is renewed when the file
    has outgrown it, and when so much was read through it that its pages would fill the process's
    resident memory (they stay in the system's page cache). Reading rows that were committed before
    opening raises ConfigError if their checksum does not match.
    """

    RESIDENT_BYTES = 2**27
    """Largest number of bytes read through one map."""
    FAULT_BYTES = 2**16
    """Bytes that touching one row may make resident around it."""

    def __init__(
        self, path: Path, width: int, dtype: torch.dtype, *, writable: bool = True
    ) -> None:
        self._width, self._dtype, self._writable = width, dtype, writable
        self.row_bytes = width * dtype.itemsize
        self._file = _File(path, writable=writable)
        self._sums = _File(path.with_name(sums_name(path.name)), writable=writable)
        self._sums_stored = 0
        self._checksums = Checksums(path, self.row_bytes, self._read)
        self._map: Tensor | None = None
        self._touched = 0

    def load(self, rows: int, tail: int) -> None:
        """Take the first `rows` rows as committed, with `tail` as the checksum of their tail, and
        drop all rows after them.
        """
        pieces = self._checksums.pieces(rows)
        if self._writable:
            self._file.cut(rows * self.row_bytes)
            self._sums.cut(pieces * SUM_BYTES)
        self._checksums.load(rows, self._sums.read(0, pieces * SUM_BYTES), tail)
        self._sums_stored = pieces

    def write(self, first: int, rows: Tensor) -> None:
        """Write `rows` [n, C] at row `first`. Raises OSError if the disk is full; earlier rows are
        unchanged.
        """
        if not rows.numel():
            return
        data = memoryview(
            rows.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data
        ).cast("B")
        self._checksums.cut(first)
        self._sums_stored = min(self._sums_stored, self._checksums.pieces(first))
        self._file.write(first * self.row_bytes, data)
        self._checksums.add(data)

    def store_sums(self, rows: int) -> None:
        """Write the checksums of all whole pieces of the first `rows` rows."""
        pieces = self._checksums.pieces(rows)
        if pieces > self._sums_stored:
            data = self._checksums.sums(self._sums_stored, pieces)
            self._sums.write(self._sums_stored * SUM_BYTES, data)
            self._sums_stored = pieces

    def tail(self, rows: int) -> int:
        """Return the checksum of the tail of the first `rows` rows, as `load` takes it."""
        return self._checksums.tail(rows)

    def sync(self) -> None:
        """Flush all writes to disk."""
        self._file.sync()
        self._sums.sync()

    def between(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) as a view of the mapped file."""
        piece = self._checksums.piece_rows
        self._checksums.verify(range(first // piece, -(-last // piece)))
        return self._mapped(last, (last - first) * self.row_bytes)[first:last]

    def at(self, rows: Tensor) -> Tensor:
        """Return a copy of the rows with the indices `rows`, on the CPU."""
        rows = rows.cpu()
        if not self._checksums.all_verified:
            self._checksums.verify(np.unique(rows.numpy() // self._checksums.piece_rows).tolist())
        count = int(rows.max()) + 1 if rows.numel() else 0
        return self._mapped(count, rows.numel() * (self.row_bytes + self.FAULT_BYTES)).index_select(
            0, rows
        )

    def close(self) -> None:
        """Close the files. Existing views stay valid."""
        self._map = None
        self._file.close()
        self._sums.close()

    def _read(self, first: int, last: int) -> bytes:
        return self._file.read(first * self.row_bytes, last * self.row_bytes)

    def _mapped(self, rows: int, touched: int) -> Tensor:
        """Return a view of all rows of the file, at least `rows`. `touched` is the number of bytes
        that the caller will read.
        """
        if rows == 0 or self.row_bytes == 0:
            return torch.empty(rows, self._width, dtype=self._dtype)
        self._touched += touched
        if self._map is None or self._map.size(0) < rows or self._touched > self.RESIDENT_BYTES:
            self._map, self._touched = None, touched  # free the old map first
            whole_rows = self._file.size // self.row_bytes * self.row_bytes
            pages = mmap.mmap(self._file.handle, whole_rows, prot=mmap.PROT_READ)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # torch warns that the map is read-only
                self._map = torch.frombuffer(pages, dtype=self._dtype).view(-1, self._width)
        return self._map


class _File:
    """An unbuffered file that tracks whether it must be flushed. Created if missing."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        mode = ("r+b" if path.exists() else "x+b") if writable else "rb"
        self._file = path.open(mode, buffering=0)
        self._dirty = writable

    @property
    def handle(self) -> int:
        return self._file.fileno()

    @property
    def size(self) -> int:
        return os.fstat(self.handle).st_size

    def read(self, first: int, last: int) -> bytes:
        return os.pread(self.handle, last - first, first)

    def write(self, offset: int, data: memoryview) -> None:
        self._dirty = True
        while data:
            written = os.pwrite(self.handle, data, offset)
            data, offset = data[written:], offset + written

    def cut(self, size: int) -> None:
        if self.size > size:
            self._dirty = True
            self._file.truncate(size)

    def sync(self) -> None:
        if self._dirty:
            os.fsync(self.handle)
            self._dirty = False

    def close(self) -> None:
        self._file.close()
