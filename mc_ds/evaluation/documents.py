"""Long documents of a corpus, for evaluations that read one document at a time."""

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError
from mc_ds.data.shards import TokenShards


def long_documents(
    shards: TokenShards, *, length: int, count: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return pieces of `length` tokens, each of another document, drawn without repetition: as many
    as there are, at most `count`. The arguments alone decide them.

    Raises ConfigError where no document is as long.
    """
    starts = shards.documents.astype(np.int64)
    ends = np.append(starts[1:], len(shards))
    (found,) = np.nonzero(ends - starts >= length)
    if not len(found):
        raise ConfigError(
            f"no held-out document has {length} tokens: use a shorter history (--seq_lens), or "
            "another corpus"
        )
    rng = np.random.default_rng(seed)
    pieces = []
    for number in rng.permutation(found)[:count]:
        offset = rng.integers(ends[number] - starts[number] - length, endpoint=True)
        pieces.append(shards.window(int(starts[number] + offset), length))
    return pieces
