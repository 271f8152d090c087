"""Lexical retrieval: ranks blocks of token ids against a query by BM25.

Legend: n_1 head blocks, K block size, X terms of a block.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError

ID_BITS = 20
"""Bits per token id: enough for any vocabulary, and three ids fit an int64."""
Ids = NDArray[np.int64]


def bm25_library() -> Any:
    """Import and return the bm25s package. Raises ConfigError if it is not installed.

    Where jax is installed, bm25s would start it, for a top-k that is not used here. On a GPU jax
    then reserves most of the memory, in every process.
    """
    try:
        with _hidden("jax", "jax.lax") if "bm25s" not in sys.modules else nullcontext():
            import bm25s
    except ImportError:
        raise ConfigError(
            "bm25 and ngram need the bm25s package: pip install 'mc_ds[retrieval]'"
        ) from None
    return bm25s


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Let importing the modules `names` fail within the block, also if they were imported
    before.
    """
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None: cannot be imported
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def bm25(documents_nX: Ids, query: Ids) -> NDArray[np.float32]:
    """Return the BM25 score of every document for the distinct terms of a query, float32 [n_1]; 0
    where they share no term.

    Terms are integers. All terms outside the query are indexed as one term: they only count for a
    document's length, and the smaller index is much faster to build.
    """
    library, wanted = bm25_library(), np.unique(query)
    place = np.searchsorted(wanted, documents_nX).clip(max=len(wanted) - 1)
    numbered = np.where(wanted[place] == documents_nX, place, len(wanted))
    vocabulary = {str(number): number for number in range(len(wanted) + 1)}
    index = library.BM25()
    index.index((numbered.tolist(), vocabulary), show_progress=False, create_empty_token=False)
    scores: NDArray[np.float32] = index.get_scores_from_ids(list(range(len(wanted))))
    return scores


def ngrams(tokens_nK: Ids, longest: int) -> Ids:
    """Return all runs of 1 to `longest` consecutive tokens of each row, each encoded as one number,
    [n_1, X].

    The ids plus one are the digits, of `ID_BITS` bits each, so that different runs have different
    numbers, also across sizes.
    """
    count = tokens_nK.shape[1]
    runs = []
    for size in range(1, min(longest, count) + 1):
        number = np.zeros_like(tokens_nK[:, : count - size + 1])
        for at in range(size):
            number = (number << ID_BITS) + tokens_nK[:, at : count - size + 1 + at] + 1
        runs.append(number)
    return np.concatenate(runs, axis=1)
