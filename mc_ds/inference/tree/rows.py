"""Tables of rows [n, C] that grow at the end: in memory here, in a file in file_rows.py.

A table does not track how many of its rows are valid; its owner does.
"""

from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """A growable table. Results of `between` and `at` must not be written to; views are valid until
    the next `write`.
    """

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        ...

    def write(self, first: int, rows: Tensor) -> None:
        """Write `rows` [n, C] at row `first`, which is at most the number of rows written before.
        Raises OSError if there is no room.
        """
        ...

    def between(self, first: int, last: int) -> Tensor:
        """Return a view of rows [first, last)."""
        ...

    def at(self, rows: Tensor) -> Tensor:
        """Return a copy of the rows with the indices `rows`, int64 [n]."""
        ...


class RamRows:
    """Rows in one tensor, whose capacity is doubled when needed."""

    SMALLEST = 1024

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._table = torch.empty(0, width, dtype=dtype, device=device)
        self.row_bytes = width * dtype.itemsize

    def write(self, first: int, rows: Tensor) -> None:
        """Write `rows` [n, C] at row `first`."""
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
        """Return a copy of the rows with the indices `rows`."""
        from_host = rows.device.type == "cpu"  # a copy from there need not be waited for
        return self._table.index_select(0, rows.to(self._table.device, non_blocking=from_host))
