"""Check the header of a GGUF file against the file's size. The `gguf` package creates an object for
every value that the header claims, even beyond the end of the file.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import struct
from pathlib import Path

from mc_ds.storage import open_regular

MAX_VALUES = 1 << 21
"""Largest number of values in all lists together: twice what a vocabulary of 262,144 pieces with
types, scores and merges has.
"""
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Size of a number in bytes, by its type."""
STRING, LIST = 8, 9


class HeaderWalk:
    """Steps through a header of version 2 or 3. Raises ValueError if it claims more than the file
    holds.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._values = content, 8, 0

    def check(self) -> None:
        """Step over all metadata and all descriptions of tensors."""
        tensors, fields = self._number("<Q"), self._number("<Q")
        for _ in range(fields):
            self._skip_string()
            self._skip_value(self._number("<I"))
        for _ in range(tensors):
            self._skip_string()
            dims = self._number("<I")
            self._skip(8 * dims + 4 + 8)

    def _skip_value(self, kind: int) -> None:
        if kind == STRING:
            self._skip_string()
        elif kind != LIST:
            self._skip(_size(kind))
        else:
            self._skip_list(self._number("<I"), self._number("<Q"))

    def _skip_list(self, kind: int, count: int) -> None:
        self._values += count
        if self._values > MAX_VALUES:
            raise ValueError(f"its lists have more than {MAX_VALUES} values")
        if kind != STRING:
            self._skip(_size(kind) * count)
            return
        for _ in range(count):
            self._skip_string()

    def _skip_string(self) -> None:
        self._skip(self._number("<Q"))

    def _number(self, form: str) -> int:
        at = self._at
        self._skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self._content, at)[0])

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            raise ValueError("its header claims more than the file holds")


def _size(kind: int) -> int:
    if kind not in SIZES:
        raise ValueError(f"a value of unknown type {kind}")
    return SIZES[kind]


def check_header(path: Path) -> None:
    """Raise OSError or ValueError for a file that is not a GGUF file in this byte order, or ends
    within its header.
    """
    with open_regular(path, follow=True) as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            HeaderWalk(content).check()
