"""Build working contexts that open head blocks in the order of given values.

Legend: R rows, T tokens, W entries, K block size, n (n_1) head blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.config.focus import FocusConfig
from mc_ds.focus.allocator import FocusAllocator
from mc_ds.focus.cover import plan_of_blocks, uniform_blocks
from mc_ds.focus.view import Plan, View


def cover_opened_by(view: View, values_Rn: Tensor, wc_length: int) -> Plan:
    """Return a cover of the history of `wc_length` entries in which the blocks with the largest
    `values_Rn` are open and the others as coarse as the budget requires.

    Uses the focus allocator with fixed scores and as many rounds and edits as it takes.
    """
    geometry = view.geometry
    exhaustive = FocusConfig(
        iterations=2 * geometry.max_lod,
        max_replacements=geometry.max_units,
        threshold=0.0,
        cooldown=0,
    )
    uniform = uniform_blocks(len(values_Rn), geometry, wc_length, view.device)
    lods, starts = plan_of_blocks(uniform, geometry, wc_length)
    allocator = FocusAllocator(view.controller, geometry, exhaustive)
    no_score = torch.zeros_like(starts, dtype=torch.float32)
    return Plan(
        *allocator.focus(lods, starts, score=lambda lods, starts: no_score, rescored=values_Rn)
    )


def blocks_opened_by(view: View, values_Rn: Tensor, wc_length: int) -> Plan:
    """Return a plan of tokens only: the tail, as many of the blocks with the largest `values_Rn` as
    fit completely, and the latest other tokens up to W entries.
    """
    geometry = view.geometry
    count = open_in_blocks(view, wc_length)
    opened = torch.zeros_like(values_Rn, dtype=torch.bool)
    opened.scatter_(1, values_Rn.topk(count, dim=1).indices, True)
    # Sort keys: the tail ranks above opened blocks, those above all others; later tokens first.
    places = torch.arange(geometry.seq_len, device=view.device).expand(len(values_Rn), -1)
    order = places.clone()
    order[:, : geometry.head_len] += (
        opened.repeat_interleave(geometry.block_size, dim=1) * geometry.seq_len
    )
    order[:, geometry.head_len :] += 2 * geometry.seq_len
    starts = order.topk(wc_length, dim=1).indices.sort(dim=1).values
    return Plan(torch.zeros_like(starts), starts)


def order_of(scores_Rn: Tensor, latest: int) -> Tensor:
    """Return values [R, n_1] in 0..1 by which blocks are opened: the `latest` last blocks rank
    first, then the others by their scores, the later block first in a tie.
    """
    blocks = scores_Rn.size(1)
    ascending = scores_Rn.argsort(dim=1, stable=True)
    ranks = torch.arange(blocks, device=scores_Rn.device).expand_as(ascending)
    values = torch.empty_like(ranks).scatter_(1, ascending, ranks)
    values[:, blocks - latest :] += blocks
    return values / (2.0 * blocks)


def with_neighbours(scores_Rn: Tensor, share: float) -> Tensor:
    """Return the scores [R, n_1] plus `share` times the larger score of the blocks next to each.

    Blocks without a score (-inf) are taken to have the lowest one of their row.
    """
    if not share or scores_Rn.size(1) < 2:
        return scores_Rn
    unknown = scores_Rn.isneginf()
    lowest = scores_Rn.masked_fill(unknown, torch.inf).amin(dim=1, keepdim=True)
    known = torch.where(unknown, lowest, scores_Rn)
    outside = F.pad(known, (1, 1), value=-torch.inf)
    return known + share * torch.maximum(outside[:, :-2], outside[:, 2:])


def open_in_blocks(view: View, wc_length: int) -> int:
    """Return how many whole blocks fit beside the tail in a plan of tokens only."""
    geometry = view.geometry
    tail = geometry.seq_len - geometry.head_len
    return min(max(0, wc_length - tail) // geometry.block_size, geometry.head_nodes[1])


def open_in_cover(view: View, wc_length: int) -> int:
    """Return how many open blocks the uniform cover of `wc_length` entries has."""
    uniform = uniform_blocks(1, view.geometry, wc_length, view.device)
    return int((uniform == 0).sum())
