"""Draw long documents of a corpus, for evaluations that read one document at a time."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mc_ds.data.shards import TokenShards


def long_documents(
    parts: Sequence[TokenShards], *, length: int, count: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return pieces of `length` tokens, each from a different document of `parts`: at most `count`,
    fewer if fewer documents are long enough. Deterministic in its arguments.
    """
    found = [
        (shards, int(start), int(end))
        for shards in parts
        for start, end in _spans(shards)
        if end - start >= length
    ]
    rng = np.random.default_rng(seed)
    pieces = []
    for number in rng.permutation(len(found))[:count]:
        shards, start, end = found[number]
        offset = rng.integers(end - start - length, endpoint=True)
        pieces.append(shards.window(start + int(offset), length))
    return pieces


def _spans(shards: TokenShards) -> NDArray[np.int64]:
    """Return the first token of each document and the one after its last, [documents, 2]."""
    starts = shards.documents.astype(np.int64)
    return np.stack([starts, np.append(starts[1:], len(shards))], axis=1)
