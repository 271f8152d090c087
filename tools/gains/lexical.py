"""Lexical features of blocks, computed from token ids without a network.

Legend: S slices, M distant blocks, F features.
"""

import numpy as np
from numpy.typing import NDArray

from gains.layout import Layout

Floats = NDArray[np.float32]

BM25_QUERIES = (4, 16, 48, 256)
"""Query lengths: numbers of last known tokens, within the tail."""
NGRAMS = (2, 3)
NGRAM_QUERY = 16
"""Number of last known tokens whose n-grams are searched."""
SUFFIX = 12
"""Maximum length of a suffix that is searched."""
K1 = 1.2
"""BM25's saturation parameter. Length normalisation is not needed: blocks have equal lengths."""
NAMES = (
    *(f"bm25_{n}" for n in BM25_QUERIES),
    *(f"ngram_{n}" for n in NGRAMS),
    "suffix",
    "rarest",
    *("before_bm25", "before_ngram", "after_bm25"),
)


def lexical_features(ids: NDArray[np.uint16], layout: Layout) -> Floats:
    """Return the features NAMES, [S, M, F], of a window's tokens [T + 1].

    `bm25_n`: BM25 with the last n known tokens as query. `ngram_n`: summed rarity of the n-grams
    that the block shares with the last 16 known tokens. `suffix`: length of the longest suffix of
    the known tokens that occurs before a token of the block. `rarest`: rarity of the rarest token
    shared with the last 16 known tokens. `before_*` and `after_*`: the features of neighbouring
    blocks.
    """
    tokens = ids[: layout.blocks * layout.block_size]
    weights, rarity, place = bm25_weights(tokens, layout)
    grams = {n: codes(tokens, n) for n in NGRAMS}
    rows = []
    for known in layout.known:
        last = {
            n: ids[max(known + 1 - n, layout.seq_len - layout.tail) : known + 1]
            for n in BM25_QUERIES
        }
        found = {n: np.unique(place[query][place[query] >= 0]) for n, query in last.items()}
        bm25 = {n: weights[:, columns].sum(1) for n, columns in found.items()}
        shared = (weights[:, found[16]] > 0) * rarity[found[16]]
        ngram = {n: ngram_matches(grams[n], ids[: known + 1], n, layout) for n in NGRAMS}
        rows.append(
            [
                *bm25.values(),
                *ngram.values(),
                suffixes(ids[: known + 1], layout),
                shared.max(1, initial=0.0),
                shifted(bm25[16], 1),
                shifted(ngram[3], 1),
                shifted(bm25[16], -1),
            ]
        )
    return np.array(rows, dtype=np.float32)[:, :, : layout.distant].transpose(0, 2, 1).copy()


def bm25_weights(
    tokens: NDArray[np.uint16], layout: Layout
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Return BM25 weights [blocks, U] of each block's U distinct tokens, their rarities [U], and
    the column of each token id (-1: does not occur).
    """
    distinct, column = np.unique(tokens, return_inverse=True)
    counts = np.zeros((layout.blocks, len(distinct)), dtype=np.float32)
    np.add.at(counts, (np.arange(len(tokens)) // layout.block_size, column), 1)
    holding = (counts > 0).sum(0)
    rarity = np.log(1 + (layout.blocks - holding + 0.5) / (holding + 0.5)).astype(np.float32)
    place = np.full(2**16, -1)
    place[distinct] = np.arange(len(distinct))
    return rarity * counts * (K1 + 1) / (counts + K1), rarity, place


def codes(tokens: NDArray[np.uint16], n: int) -> NDArray[np.uint64]:
    """Return a number for the n-gram ending at each token, from the n-th token on."""
    wide = tokens.astype(np.uint64)
    total = wide[n - 1 :].copy()
    for back in range(1, n):
        total += wide[n - 1 - back : len(wide) - back] << np.uint64(16 * back)
    return total


def ngram_matches(
    grams: NDArray[np.uint64], known: NDArray[np.uint16], n: int, layout: Layout
) -> Floats:
    """Return the summed rarity of the n-grams that each block shares with the last known tokens,
    [blocks].
    """
    scores = np.zeros(layout.blocks, dtype=np.float32)
    for gram in np.unique(codes(known[-NGRAM_QUERY:], n)):
        holding = np.unique((np.flatnonzero(grams == gram) + n - 1) // layout.block_size)
        if len(holding):
            scores[holding] += np.log((layout.blocks + 0.5) / (len(holding) + 0.5))
    return scores


def suffixes(known: NDArray[np.uint16], layout: Layout) -> Floats:
    """Return the length of the longest suffix of the known tokens that occurs before a token of
    each block, [blocks].
    """
    size = layout.blocks * layout.block_size
    length = np.zeros(size, dtype=np.float32)  # indexed by the token after the suffix
    same = np.ones(size, dtype=bool)
    for back in range(SUFFIX):
        earlier = np.arange(size) - 1 - back
        same &= (earlier >= 0) & (known[earlier] == known[-1 - back])
        length += same
    return length.reshape(layout.blocks, -1).max(1)


def shifted(scores: Floats, by: int) -> Floats:
    """Return for each block the score of the block `by` positions before it; 0 at the ends."""
    moved = np.zeros_like(scores)
    if by > 0:
        moved[by:] = scores[:-by]
    else:
        moved[:by] = scores[-by:]
    return moved
