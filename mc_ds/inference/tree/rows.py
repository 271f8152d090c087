"""Rows [n, C] that grow at their end: in memory on a device, or in a file that is written through
and read through a memory map.

Rows know nothing of trees or commits: whoever owns them knows how many rows count.
"""

import mmap
import os
import warnings
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """A growable table. What `between` and `at` return is to be read only; views hold until rows
    are written again.
    """

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        ...

    def write(self, first: int, rows: Tensor) -> None:
        """Put `rows` [n, C] at `first`, which is at most the number of rows written before. Raises
        OSError where there is no room.
        """
        ...

    def between(self, first: int, last: int) -> Tensor:
        """Return rows [first, last), a view."""
        ...

    def at(self, rows: Tensor) -> Tensor:
        """Return a copy of the rows at the indices `rows` [n] int64, below `count`."""
        ...


class RamRows:
    """Rows in one tensor, whose capacity doubles."""

    SMALLEST = 1024

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._table = torch.empty(0, width, dtype=dtype, device=device)
        self.row_bytes = width * dtype.itemsize

    def write(self, first: int, rows: Tensor) -> None:
        """Copy `rows` [n, C] to `first`."""
        last = first + rows.size(0)
        if last > self._table.size(0):
            grown = self._table.new_empty(
                max(last, 2 * self._table.size(0), self.SMALLEST), self._table.size(1)
            )
            grown[:first] = self._table[:first]
            self._table = grown
        self._table[first:last] = rows

    def between(self, first: int, last: int) -> Tensor:
        """Return a view of rows [first, last)."""
        return self._table[first:last]

    def at(self, rows: Tensor) -> Tensor:
        """Return the rows at `rows`."""
        return self._table.index_select(0, rows.to(self._table.device))


class FileRows:
    """Rows in a file: native little-endian numbers, row after row, nothing else.

    Writing goes through the file; reading through a map that is made anew when the file has
    outgrown it, or when so much was read through it that its pages would fill the process's
    resident memory (the system's page cache keeps them all the same).
    """

    RESIDENT_BYTES = 2**27
    """Bytes read through one map at most."""
    FAULT_BYTES = 2**16
    """What touching one row may map around it."""

    def __init__(
        self, path: Path, width: int, dtype: torch.dtype, *, writable: bool = True
    ) -> None:
        self.path, self._width, self._dtype = path, width, dtype
        self.row_bytes = width * dtype.itemsize
        mode = ("r+b" if path.exists() else "x+b") if writable else "rb"
        self._file = path.open(mode, buffering=0)
        self._map: Tensor | None = None
        self._touched = 0
        self._dirty = writable

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file.fileno()).st_size

    def cut(self, rows: int) -> None:
        """Drop what lies behind the first `rows` rows."""
        if self.size > rows * self.row_bytes:
            self._map, self._dirty = None, True
            self._file.truncate(rows * self.row_bytes)

    def write(self, first: int, rows: Tensor) -> None:
        """Write `rows` [n, C] at `first`. Raises OSError where the disk is full; what was there
        before `first` is untouched.
        """
        if not rows.numel():
            return
        data = memoryview(
            rows.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data
        ).cast("B")
        offset = first * self.row_bytes
        self._dirty = True
        while data:
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        """Flush what was written to disk."""
        if self._dirty:
            os.fsync(self._file.fileno())
            self._dirty = False

    def between(self, first: int, last: int) -> Tensor:
        """Return a view of rows [first, last), in the file."""
        return self._mapped(last, (last - first) * self.row_bytes)[first:last]

    def at(self, rows: Tensor) -> Tensor:
        """Return the rows at `rows`, on the CPU."""
        rows = rows.cpu()
        count = int(rows.max()) + 1 if rows.numel() else 0
        return self._mapped(count, rows.numel() * (self.row_bytes + self.FAULT_BYTES)).index_select(
            0, rows
        )

    def close(self) -> None:
        """Close the file; views live on."""
        self._map = None
        self._file.close()

    def _mapped(self, rows: int, touched: int) -> Tensor:
        """Return all rows of the file, at least `rows`, of which `touched` bytes are about to be
        read.
        """
        if rows == 0 or self.row_bytes == 0:
            return torch.empty(rows, self._width, dtype=self._dtype)
        self._touched += touched
        if self._map is None or self._map.size(0) < rows or self._touched > self.RESIDENT_BYTES:
            self._map, self._touched = None, touched  # freed before the new one is made
            pages = mmap.mmap(
                self._file.fileno(),
                self.size // self.row_bytes * self.row_bytes,
                prot=mmap.PROT_READ,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that the map cannot be written
                self._map = torch.frombuffer(pages, dtype=self._dtype).view(-1, self._width)
        return self._map
