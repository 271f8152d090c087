"""The focus decisions that a move (a -> b) between two working contexts of one sequence consists
of.

Per entry i of a that lies outside the tail and wholly inside what b covers: b *expands* it where
b has more than one entry on its span, and *collapses* it where b has one coarser node there. The
weight of a decision is the number of entries that it adds or frees, over K - 1, so that between
full-coverage contexts of one length the expansions of a move weigh as much as its collapses.

Legend: B sequences, G rows of a sequence (a and b index them), W entries, T tokens, K block
size. Source: docs/lensnet-pairwise-training.md, "Preference learning", a move's decisions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mc_ds.geometry import Geometry, lod_map, spans, start_counts


class Decisions(NamedTuple):
    """For every move (a -> b) the weights w of its decisions d at each entry of a: [B, a, b, W]
    float32. At most one of the two is above 0.
    """

    expand: Tensor
    """w of entries that b expands (d = +1): (n_b - 1) / (K - 1), with n_b entries of b on the
    span.
    """
    collapse: Tensor
    """w of entries that b collapses into a node j (d = -1): (n_a - 1) / (K - 1), shared equally by
    the n_a entries of a under j.
    """


def decide(lods: Tensor, starts: Tensor, geometry: Geometry) -> Decisions:
    """Compute the decisions of all ordered pairs of rows of each sequence from the plans `lods`
    and `starts`, int64 [B, G, W].
    """
    children = geometry.block_size
    rows = lods.shape[1]
    counts = start_counts(starts, geometry.seq_len)
    token_lods = lod_map(lods, counts)

    def of_a(x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, rows, -1)

    def of_b(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, rows, -1, -1)

    begin, lod_a = of_a(starts.long()), of_a(lods.long())
    end = of_a(starts.long() + spans(lods, children))
    lod_b = of_b(token_lods).gather(
        3, begin
    )  # -1 where b does not cover the entry's first token, hence not all of it
    counts_a, counts_b = of_a(counts), of_b(counts)

    entries_b = counts_b.gather(3, end) - counts_b.gather(3, begin)
    node_span = spans(lod_b.clamp_min(0), children)
    node_begin = begin // node_span * node_span
    entries_a = counts_a.gather(3, node_begin + node_span) - counts_a.gather(3, node_begin)

    decided = (begin < geometry.head_len) & (lod_b >= 0)
    coarser = decided & (lod_b > lod_a)
    expand = torch.where(decided, (entries_b - 1).clamp_min(0), 0).float() / (children - 1)
    freed = torch.where(coarser, entries_a - 1, 0).float() / (children - 1)
    return Decisions(expand, freed / entries_a.clamp_min(1))
