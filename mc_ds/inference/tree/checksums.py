"""CRC-32 of every piece of a table of rows: what the disk gives back is verified before it is used.

A piece is some whole rows, about `PIECE_BYTES`. Each piece of what was committed is verified once,
when any of its rows is read for the first time. The rows behind the last whole piece, the tail,
have a sum of their own, which is verified at once: more rows are about to follow them.
"""

import sys
import zlib
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.inference.tree.folder import REMEDY

PIECE_BYTES = 2**16
"""Of a piece at most; a longer row is a piece of its own. Part of the format."""
SUM_BYTES = array("I").itemsize


def rows_of_piece(row_bytes: int) -> int:
    """Return how many rows of that size a piece has."""
    return max(1, PIECE_BYTES // row_bytes) if row_bytes else sys.maxsize


def sums_bytes(rows: int, row_bytes: int) -> int:
    """Return the size of the file that holds the sums of the whole pieces of `rows` rows."""
    return rows // rows_of_piece(row_bytes) * SUM_BYTES


class Checksums:
    """The sums of one table, which grows at its end. Damage raises ConfigError."""

    def __init__(self, path: Path, row_bytes: int, read: Callable[[int, int], bytes]) -> None:
        """`read` returns the bytes of rows [first, last) of the file `path`, as they are on
        disk.
        """
        self._path, self._row_bytes, self._read = path, row_bytes, read
        self.piece_rows = rows_of_piece(row_bytes)
        self._sums = array("I")
        self._tail = self._rows = 0
        self._doubtful = bytearray()
        """By whole piece that was committed before: 1 until it is verified."""
        self._doubts = 0

    def load(self, rows: int, sums: bytes, tail: int) -> None:
        """Take over the sums of `rows` committed rows, and verify the tail."""
        self._sums, self._tail, self._rows = array("I", sums), tail, rows
        self._doubts = len(self._sums)
        self._doubtful = bytearray(b"\1") * self._doubts
        self._compare(self._doubts * self.piece_rows, rows, tail)

    def cut(self, rows: int) -> None:
        """Drop the sums of all but the first `rows` rows; call it before others are written in
        their place.
        """
        self._tail, self._rows = self.tail(rows), rows
        pieces = self.pieces(rows)
        self._doubts -= sum(self._doubtful[pieces:])
        del self._sums[pieces:], self._doubtful[pieces:]

    def add(self, data: memoryview) -> None:
        """Add the sums of rows that were written behind the others."""
        while data:
            room = (self.piece_rows - self._rows % self.piece_rows) * self._row_bytes
            part, data = data[:room], data[room:]
            self._tail = zlib.crc32(part, self._tail)
            self._rows += len(part) // self._row_bytes
            if len(part) == room:
                self._sums.append(self._tail)
                self._tail = 0

    @property
    def all_verified(self) -> bool:
        """Return whether `verify` has nothing left to do."""
        return not self._doubts

    def tail(self, rows: int) -> int:
        """Return the sum of the last rows of the first `rows`, behind their last whole piece."""
        if rows == self._rows:
            return self._tail
        piece = rows // self.piece_rows
        self.verify([piece])
        return zlib.crc32(self._read(piece * self.piece_rows, rows))

    def pieces(self, rows: int) -> int:
        """Return the number of whole pieces of the first `rows` rows."""
        return rows // self.piece_rows

    def sums(self, first: int, last: int) -> memoryview:
        """Return the sums of pieces [first, last), as they are stored."""
        return memoryview(self._sums[first:last]).cast("B")

    def verify(self, pieces: Iterable[int]) -> None:
        """Compare pieces with the disk, unless they were verified before or written since."""
        for piece in () if self.all_verified else pieces:
            if piece < len(self._doubtful) and self._doubtful[piece]:
                start = piece * self.piece_rows
                self._compare(start, start + self.piece_rows, self._sums[piece])
                self._doubtful[piece] = 0
                self._doubts -= 1

    def _compare(self, first: int, last: int, expected: int) -> None:
        if zlib.crc32(self._read(first, last)) != expected:
            raise ConfigError(
                f"the tree {self._path.parent} is damaged: rows {first} to {last} of "
                f"{self._path.name} do not have their checksum; {REMEDY}"
            )
