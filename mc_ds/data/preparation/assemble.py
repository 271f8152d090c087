"""Writes the selected documents of all parts to the splits of a dataset."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mc_ds.data.dataset import DatasetWriter
from mc_ds.data.manifest import SplitName
from mc_ds.data.preparation.parts import Part
from mc_ds.data.preparation.selection import TRAIN, VALIDATION

CODES: dict[SplitName, int] = {"train": TRAIN, "validation": VALIDATION}


def assemble(parts: Iterable[Part], codes: NDArray[np.uint8], writer: DatasetWriter) -> None:
    """Write the documents of `parts`, in order. `codes` [documents] has the split of each."""
    for part, owners in _with_owners(parts):
        chosen = codes[owners]
        for split, code in CODES.items():
            keep = chosen == code
            lengths = part.lengths[keep]
            starts = (np.cumsum(lengths) - lengths)[~part.continues[keep]]
            writer.extend(split, part.tokens[np.repeat(keep, part.lengths)], starts)


def assemble_by_position(
    parts: Iterable[Part],
    codes: NDArray[np.uint8],
    writer: DatasetWriter,
    *,
    train_tokens: int,
    separator_id: int,
) -> None:
    """Split the only document that `codes` keeps: write its first `train_tokens` tokens to the
    training split, and the rest, as a separate document, to validation.
    """
    written = 0
    nothing = np.zeros(0, np.int64)
    for part, owners in _with_owners(parts):
        tokens = part.tokens[np.repeat(codes[owners] == TRAIN, part.lengths)]
        before, after = np.split(tokens, [max(0, train_tokens - written)])
        if before.size:
            writer.extend("train", before, nothing if written else np.zeros(1, np.int64))
        if after.size and written <= train_tokens:
            writer.append("validation", np.array([separator_id]))
            written += 1  # the separator: makes the next part continue the validation document
        writer.extend("validation", after, nothing)
        written += tokens.size


def _with_owners(parts: Iterable[Part]) -> Iterator[tuple[Part, NDArray[np.int64]]]:
    """Yield each part with an array of the document index of each record."""
    last = -1
    for part in parts:
        owners = last + np.cumsum(~part.continues)
        last = int(owners[-1]) if owners.size else last
        yield part, owners
