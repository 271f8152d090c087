"""CRC-32 checksums of the pieces of a table of rows: data from the disk is verified before it is
used.

A piece is a number of whole rows, of about `PIECE_BYTES`. Each committed piece is verified once,
when one of its rows is first read. The rows after the last whole piece, the *tail*, have a checksum
of their own, which is verified at opening, because appending continues it.
"""

import sys
import zlib
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

from mc_ds.config.errors import ConfigError
from mc_ds.inference.tree.folder import REMEDY

PIECE_BYTES = 2**16
"""Largest size of a piece; a longer row is a piece of its own. Part of the format."""
SUM_BYTES = array("I").itemsize


def rows_of_piece(row_bytes: int) -> int:
    """Return how many rows of `row_bytes` bytes make a piece."""
    return max(1, PIECE_BYTES // row_bytes) if row_bytes else sys.maxsize


def sums_bytes(rows: int, row_bytes: int) -> int:
    """Return the size of the file with the checksums of the whole pieces of `rows` rows."""
    return rows // rows_of_piece(row_bytes) * SUM_BYTES


class Checksums:
    """The checksums of one table that grows at its end. Raises ConfigError for damaged rows."""

    def __init__(self, path: Path, row_bytes: int, read: Callable[[int, int], bytes]) -> None:
        """`read` returns the bytes of rows [first, last) of the file `path` as stored on disk."""
        self._path, self._row_bytes, self._read = path, row_bytes, read
        self.piece_rows = rows_of_piece(row_bytes)
        self._sums = array("I")
        self._tail = self._rows = 0
        self._unverified = bytearray()
        """For each piece that was committed before opening: 1 until it is verified, then 0."""
        self._unverified_count = 0

    def load(self, rows: int, sums: bytes, tail: int) -> None:
        """Set the checksums of `rows` committed rows, and verify their tail."""
        self._sums, self._tail, self._rows = array("I", sums), tail, rows
        self._unverified_count = len(self._sums)
        self._unverified = bytearray(b"\1") * self._unverified_count
        self._compare(self._unverified_count * self.piece_rows, rows, tail)

    def cut(self, rows: int) -> None:
        """Drop the checksums of all rows after the first `rows`. Call this before those rows are
        overwritten.
        """
        self._tail, self._rows = self.tail(rows), rows
        pieces = self.pieces(rows)
        self._unverified_count -= sum(self._unverified[pieces:])
        del self._sums[pieces:], self._unverified[pieces:]

    def add(self, data: memoryview) -> None:
        """Add the checksums of rows that were appended."""
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
        """Whether `verify` has nothing left to do."""
        return not self._unverified_count

    def tail(self, rows: int) -> int:
        """Return the checksum of the tail of the first `rows` rows."""
        if rows == self._rows:
            return self._tail
        piece = rows // self.piece_rows
        self.verify([piece])
        return zlib.crc32(self._read(piece * self.piece_rows, rows))

    def pieces(self, rows: int) -> int:
        """Return the number of whole pieces in the first `rows` rows."""
        return rows // self.piece_rows

    def sums(self, first: int, last: int) -> memoryview:
        """Return the checksums of pieces [first, last) as they are stored."""
        return memoryview(self._sums[first:last]).cast("B")

    def verify(self, pieces: Iterable[int]) -> None:
        """Verify pieces that were neither verified before nor written since opening."""
        for piece in () if self.all_verified else pieces:
            if piece < len(self._unverified) and self._unverified[piece]:
                start = piece * self.piece_rows
                self._compare(start, start + self.piece_rows, self._sums[piece])
                self._unverified[piece] = 0
                self._unverified_count -= 1

    def _compare(self, first: int, last: int, expected: int) -> None:
        if zlib.crc32(self._read(first, last)) != expected:
            raise ConfigError(
                f"the tree {self._path.parent} is damaged: rows {first} to {last} of "
                f"{self._path.name} do not match their checksum; {REMEDY}"
            )
