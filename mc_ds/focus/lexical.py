"""Lexical retrieval: blocks of token ids as documents, ranked by BM25 against a query.

Legend: V visible tokens, n_1 head blocks, K block size, Q query tokens, X terms of a block.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError

ID_BITS = 20
"""Bits that hold a token id and three of which fit an int64."""
Ids = NDArray[np.int64]


def bm25_library() -> Any:
    """Import the bm25s package. Raises ConfigError, in one line, where it is not installed."""
    try:
        import bm25s
    except ImportError:
        raise ConfigError(
            "bm25 and ngram need the bm25s package: pip install 'mc_ds[retrieval]'"
        ) from None
    return bm25s


def bm25(documents_nX: Ids, query: Ids) -> NDArray[np.float32]:
    """Return the BM25 score of every document [n_1] for the distinct terms of a query; 0 where they
    share none.

    Both are terms by number. Terms outside the query count for a document's length alone, so
    they are one term to the index, which is built in a fraction of the time.
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
    """Return all runs of 1 to `longest` tokens within each row, each as one number, [n, X].

    The number has the ids of the run, plus one, as digits of `ID_BITS` bits: different runs of any
    size have different numbers.
    """
    count = tokens_nK.shape[1]
    runs = []
    for size in range(1, min(longest, count) + 1):
        number = np.zeros_like(tokens_nK[:, : count - size + 1])
        for at in range(size):
            number = (number << ID_BITS) + tokens_nK[:, at : count - size + 1 + at] + 1
        runs.append(number)
    return np.concatenate(runs, axis=1)
