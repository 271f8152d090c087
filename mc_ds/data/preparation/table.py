"""A file with one row per document, so that preparation needs only some of them in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_ds.data.preparation.parts import Part
from mc_ds.data.text.cutting import digest_of

ROW = np.dtype([("digest", "V16"), ("key", "<u8"), ("tokens", "<u8")])
"""A document: digest of its text, `key_of` its split, and length in tokens."""
ROWS_AT_ONCE = 1 << 16
"""Rows read into memory at once."""


def write_table(path: Path, parts: Iterable[Part]) -> int:
    """Write one row for each document of `parts`, in order; return their number."""
    count = 0
    last = np.zeros(0, ROW)
    with path.open("wb") as file:
        for part in parts:
            rows = _rows(last, part)
            file.write(rows[:-1].tobytes())
            count += max(0, len(rows) - 1)
            last = rows[-1:]
        file.write(last.tobytes())
    return count + len(last)


def read_table(path: Path) -> Iterator[NDArray[Any]]:
    """Yield the rows of a table, up to ROWS_AT_ONCE at a time."""
    with path.open("rb") as file:
        while (rows := np.fromfile(file, ROW, ROWS_AT_ONCE)).size:
            yield rows


def _rows(last: NDArray[Any], part: Part) -> NDArray[Any]:
    """Return `last`, the row before `part`, and the rows of the documents that start in `part`.

    `last` is updated with records of `part` that continue its document.
    """
    rows = np.zeros(len(part.lengths), ROW)
    rows["digest"] = part.digests.reshape(-1).view("V16")
    rows["key"] = np.ascontiguousarray(part.digests[:, :8]).reshape(-1).view("<u8")
    rows["tokens"] = part.lengths
    rows = np.concatenate([last, rows])
    continues = np.concatenate([np.zeros(len(last), np.bool_), part.continues])
    owner = np.cumsum(~continues) - 1
    for number in np.flatnonzero(continues):
        first = np.flatnonzero(owner == owner[number])[0]
        both = rows["digest"][first].tobytes() + rows["digest"][number].tobytes()
        rows["digest"][first] = np.void(digest_of(both))
        rows["tokens"][first] += rows["tokens"][number]
    return rows[~continues]
