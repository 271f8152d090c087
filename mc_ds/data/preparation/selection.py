"""Selects the documents to keep and the split of each. Depends only on the texts, except that of
equal texts the first is kept.
"""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.preparation.table import ROWS_AT_ONCE, read_table

LEFT_OUT, TRAIN, VALIDATION = 0, 1, 2
BUCKETS = 256
"""Maximum temporary files into which the table is divided by digest, to find duplicates in memory
file by file.
"""
_ENTRY = np.dtype([("digest", "<u8", 2), ("number", "<u8")])


def select(
    table: Path,
    count: int,
    *,
    min_tokens: int,
    max_tokens: int | None,
    val_fraction: float,
) -> tuple[NDArray[np.uint8], Counter[str]]:
    """Return every document's code, [count] of LEFT_OUT, TRAIN or VALIDATION, and how many were
    left out, by reason.

    Leaves out documents outside the length limits, then all but the first of equal texts. If only
    one document remains it is TRAIN, for the caller to split by position. Raises ConfigError if
    none remains, or if a split is empty.
    """
    codes = np.empty(count, np.uint8)
    left_out: Counter[str] = Counter()
    start = 0
    for rows in read_table(table):
        split = np.where(rows["key"] < val_fraction * 2.0**64, VALIDATION, TRAIN)
        for reason, out in (
            ("too short", rows["tokens"] < min_tokens),
            ("too long", rows["tokens"] > (max_tokens or np.inf)),
        ):
            left_out[reason] += int((out & (split != LEFT_OUT)).sum())
            split[out] = LEFT_OUT
        codes[start : start + len(rows)] = split
        start += len(rows)
    left_out["duplicates"] = _drop_duplicates(table, codes)
    _check_splits(table, codes, val_fraction)
    return codes, left_out


def is_train(key: int, val_fraction: float) -> bool:
    """Return whether a document with this `key_of` belongs to the training split."""
    return not key < val_fraction * 2.0**64


def _drop_duplicates(table: Path, codes: NDArray[np.uint8]) -> int:
    """Set all but the first kept document of each text to LEFT_OUT; return their number."""
    buckets = min(BUCKETS, -(-len(codes) // ROWS_AT_ONCE))
    paths = [table.with_name(f"bucket-{number}") for number in range(buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        start = 0
        for rows in read_table(table):
            entries = np.zeros(len(rows), _ENTRY)
            entries["digest"] = np.ascontiguousarray(rows["digest"]).view("<u8").reshape(-1, 2)
            entries["number"] = np.arange(start, start + len(rows))
            entries = entries[codes[start : start + len(rows)] != LEFT_OUT]
            bucket = entries["digest"][:, 0] % np.uint64(max(1, buckets))
            for number, file in enumerate(files):
                file.write(entries[bucket == number].tobytes())
            start += len(rows)
    dropped = 0
    for path in paths:
        entries = np.fromfile(path, _ENTRY)
        order = np.lexsort((entries["number"], entries["digest"][:, 1], entries["digest"][:, 0]))
        entries = entries[order]
        same = (entries["digest"][1:] == entries["digest"][:-1]).all(axis=1)
        codes[entries["number"][1:][same]] = LEFT_OUT
        dropped += int(same.sum())
        path.unlink()
    return dropped


def _check_splits(table: Path, codes: NDArray[np.uint8], val_fraction: float) -> None:
    kept = int(np.count_nonzero(codes))
    if kept == 0:
        raise ConfigError(
            "no document is left after skipping empty ones, duplicates, and those outside of"
            " --min_document_tokens and --max_document_tokens: give other inputs or limits"
        )
    if kept == 1:
        codes[codes != LEFT_OUT] = TRAIN
        return
    counts = np.bincount(codes, minlength=3)
    if counts[TRAIN] and counts[VALIDATION]:
        return
    least, most = (key / 2.0**64 for key in _kept_keys(table, codes))
    if counts[TRAIN]:
        empty, share = "validation", np.floor(least * 1000 + 1) / 1000
    else:
        empty, share = "training", np.floor(most * 1000) / 1000
    usable = f"--val_fraction {share:.3f}, or " if 0 < share < 0.5 else ""
    raise ConfigError(
        f"none of {kept} documents falls into the {empty} split with --val_fraction"
        f" {val_fraction}: use {usable}more documents"
    )


def _kept_keys(table: Path, codes: NDArray[np.uint8]) -> list[int]:
    """Return the smallest and the largest key of the kept documents."""
    keys: list[int] = []
    start = 0
    for rows in read_table(table):
        kept: NDArray[Any] = rows["key"][codes[start : start + len(rows)] != LEFT_OUT]
        keys = [f(map(int, [*keys, *kept])) for f in (min, max)] if kept.size else keys
        start += len(rows)
    return keys
