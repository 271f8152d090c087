"""Retrieval policies: choose blocks by how well they match the last visible tokens (the query),
without LensNet.

A share of the open blocks is chosen by match; the others are the latest blocks. Retrieval reads the
same tokens as LensNet; `attention` also runs the backbone over all of them.

Legend: R rows, V visible tokens, W entries, K block size, n (n_1) head blocks, D width.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.config import RetrievalConfig
from mc_ds.focus.lexical import bm25, ngrams
from mc_ds.focus.opening import (
    blocks_opened_by,
    cover_opened_by,
    open_in_blocks,
    open_in_cover,
    order_of,
    with_neighbours,
)
from mc_ds.focus.view import Plan, View

Match = Callable[[View, int], Tensor]
"""Maps a view and a query length (last visible tokens) to scores of the head blocks, [R, n_1]."""


def retrieved(view: View, wc_length: int, *, match: Match, settings: RetrievalConfig) -> Plan:
    """Return a context that opens the latest blocks and the blocks that match best, as a cover or
    as blocks alone (`settings.shape`).
    """
    covers = settings.shape == "cover"
    count = (open_in_cover if covers else open_in_blocks)(view, wc_length)
    latest = count - round(settings.share * count)
    scores = match(view, settings.query_tokens).to(view.device)
    values = order_of(with_neighbours(scores, settings.neighbours), latest)
    return (cover_opened_by if covers else blocks_opened_by)(view, values, wc_length)


def bm25_match(view: View, query_tokens: int) -> Tensor:
    """Score blocks by BM25 over their token ids."""
    return _lexical(view, query_tokens, longest=1)


def ngram_match(view: View, query_tokens: int) -> Tensor:
    """Score blocks by BM25 over runs of one to three tokens, so that repeated phrases count too."""
    return _lexical(view, query_tokens, longest=3)


def dense_match(view: View, query_tokens: int) -> Tensor:
    """Score blocks by the cosine of their mean embedding and the query's mean embedding, after
    subtracting the mean of the history from both.
    """
    embedded, geometry = view.embeddings().float(), view.geometry
    centred = embedded - embedded.mean(dim=1, keepdim=True)
    blocks = centred[:, : geometry.head_len].unflatten(1, (-1, geometry.block_size)).mean(dim=2)
    query = centred[:, -query_tokens:].mean(dim=1, keepdim=True)
    return F.cosine_similarity(blocks, query, dim=2)


def attention_match(view: View, query_tokens: int) -> Tensor:
    """Score blocks by the attention that the query's tokens give them when the backbone reads all
    visible tokens.

    The first token is ignored: it is an attention sink.
    """
    mass, geometry = view.attention(query_tokens).clone(), view.geometry
    mass[:, 0] = 0
    return mass[:, : geometry.head_len].unflatten(1, (-1, geometry.block_size)).sum(dim=2)


def _lexical(view: View, query_tokens: int, longest: int) -> Tensor:
    geometry, visible = view.geometry, view.visible.cpu().numpy()
    blocks_RnK = visible[:, : geometry.head_len].reshape(len(visible), -1, geometry.block_size)
    queries = visible[:, -query_tokens:]
    scores = [
        bm25(ngrams(blocks, longest), ngrams(query[None], longest)[0])
        for blocks, query in zip(blocks_RnK, queries, strict=True)
    ]
    return torch.from_numpy(np.stack(scores))
