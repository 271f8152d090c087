"""Long documents of a corpus, for evaluations that read one document at a time."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError
from mc_ds.data.shards import TokenShards

SCANNED = 2**20
"""Tokens that are searched for separators at once."""


def long_documents(
    shards: TokenShards, separator: int, *, length: int, count: int, seed: int
) -> list[NDArray[np.int64]]:
    """Pieces of `length` tokens, each of another document, drawn without repetition; as many as
    there are, at most `count`. They are a function of the arguments alone.

    Raises ConfigError where no document is as long.
    """
    found = [
        (first, last) for first, last in _documents(shards, separator) if last - first >= length
    ]
    if not found:
        raise ConfigError(
            f"no held-out document has {length} tokens: use a shorter history (--seq_lens), or "
            "another corpus"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(found))[:count]
    return [
        shards.window(first + int(rng.integers(last - first - length, endpoint=True)), length)
        for first, last in (found[number] for number in order)
    ]


def _documents(shards: TokenShards, separator: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of tokens between separators."""
    first = 0
    for start in range(0, len(shards), SCANNED):
        part = shards.window(start, min(SCANNED, len(shards) - start))
        for place in np.flatnonzero(part == separator) + start:
            yield first, int(place)
            first = int(place) + 1
    yield first, len(shards)
