"""Focus decisions: how a move (a -> b) between two working contexts of one sequence changes the
level of detail of each entry.

Decisions exist for entries of a that lie before the tail and completely inside what b covers. b
*expands* an entry if b has more than one entry on its span, and *collapses* it if b has one coarser
node there. The weight of a decision is the number of entries that it adds or frees, divided by K -
1. Between full-coverage contexts of one length the expansions of a move therefore weigh as much as
its collapses.

Legend: B sequences, G rows of a sequence (a and b index them), W entries, P = T + 1 positions of T
tokens, K block size. Source: docs/lensnet-pairwise-training.md, "Preference learning", a move's
decisions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.geometry import Geometry, lod_map, spans, start_counts


class Decisions(NamedTuple):
    """Weights w of the decisions of every move (a -> b) at each entry of a, float32 [B, a, b, W].
    At most one of the two is above 0.
    """

    expand: Tensor
    """Weights of expanded entries: (n_b - 1) / (K - 1), where b has n_b entries on the span."""
    collapse: Tensor
    """Weights of entries collapsed into a node j of b: (n_a - 1) / (K - 1), shared equally by the
    n_a entries of a under j.
    """


def decide(lods_BGW: Tensor, starts_BGW: Tensor, geometry: Geometry) -> Decisions:
    """Return the decisions of all ordered pairs of rows of each sequence, given the rows' plans."""
    children = geometry.block_size
    rows = lods_BGW.shape[1]
    counts_BGP = start_counts(starts_BGW, geometry.seq_len)
    token_lods_BGT = lod_map(lods_BGW, counts_BGP)

    # Every row in the role of a, and of b: [B, a, b, ...].
    def as_a(x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, rows, -1)

    def as_b(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, rows, -1, -1)

    begin_BabW, lod_a_BabW = as_a(starts_BGW.long()), as_a(lods_BGW.long())
    end_BabW = as_a(starts_BGW.long() + spans(lods_BGW, children))
    # LOD of b at the entry's first token; -1 where b does not cover that token.
    lod_b_BabW = as_b(token_lods_BGT).gather(3, begin_BabW)
    counts_a_BabP, counts_b_BabP = as_a(counts_BGP), as_b(counts_BGP)

    # Number of b's entries on the span of the entry.
    entries_b_BabW = counts_b_BabP.gather(3, end_BabW) - counts_b_BabP.gather(3, begin_BabW)
    # Number of a's entries under b's node there.
    node_span = spans(lod_b_BabW.clamp_min(0), children)
    node_begin = begin_BabW // node_span * node_span
    entries_a_BabW = counts_a_BabP.gather(3, node_begin + node_span) - counts_a_BabP.gather(
        3, node_begin
    )

    decided = (begin_BabW < geometry.head_len) & (lod_b_BabW >= 0)
    coarser = decided & (lod_b_BabW > lod_a_BabW)
    expand = torch.where(decided, (entries_b_BabW - 1).clamp_min(0), 0).float() / (children - 1)
    freed = torch.where(coarser, entries_a_BabW - 1, 0).float() / (children - 1)
    return Decisions(expand, freed / entries_a_BabW.clamp_min(1))


def decide_blocks(starts_BGW: Tensor, geometry: Geometry) -> Decisions:
    """Return the decisions of all ordered pairs of rows of tokens alone (`random_blocks`), at the
    entries of `geometry.lod1_cover`, [B, a, b, n_1 + tail].

    b expands a block by the share of its tokens that b has more than a, and collapses it by the
    share that it has less.
    """
    block = geometry.block_size
    counts_BGP = start_counts(starts_BGW, geometry.seq_len)[..., : geometry.head_len + 1 : block]
    held_BGn = counts_BGP.diff(dim=-1)
    more = (held_BGn[:, None] - held_BGn[:, :, None]).float() / block
    more = F.pad(more, (0, geometry.seq_len - geometry.head_len))
    return Decisions(more.clamp_min(0), (-more).clamp_min(0))
