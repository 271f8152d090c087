"""Full-coverage working contexts as the LOD of every head block, and edits of them.

Expanding a level-l node into its K children adds K - 1 entries; collapsing K siblings into their
parent removes K - 1. Each is one *unit*, so one expansion traded for one collapse leaves the length
unchanged. Block LODs always describe a context that covers the history with aligned spans.

Legend: R rows, W entries, T tokens, K block size, n_l whole level-l nodes of the head, n = n_1 head
blocks. "Open": read token by token, at LOD0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.geometry import Geometry


def covering_entries(starts_RW: Tensor, geometry: Geometry) -> Tensor:
    """Return the index in the row of the entry that covers each head block's first token, int64 [R,
    n_1]; -1 where none does.
    """
    firsts = torch.arange(0, geometry.head_len, geometry.block_size, device=starts_RW.device)
    rows = starts_RW.size(0)
    return (
        torch.searchsorted(starts_RW.contiguous(), firsts.expand(rows, -1).contiguous(), right=True)
        - 1
    )


def block_lods(lods_RW: Tensor, starts_RW: Tensor, geometry: Geometry) -> Tensor:
    """Return the LOD of every head block of a plan, int64 [R, n_1]; -1 where no entry covers it."""
    covering = covering_entries(starts_RW, geometry)
    lods = lods_RW.long().gather(1, covering.clamp_min(0))
    return lods.masked_fill(covering < 0, -1)


def block_scores(
    scores_RW: Tensor, lods_RW: Tensor, starts_RW: Tensor, geometry: Geometry
) -> Tensor:
    """Return the score of every head block [R, n_1] of a full-coverage plan: the mean score of its
    tokens where it is open, else the score of the gist that covers it.
    """
    covering = covering_entries(starts_RW, geometry).clamp_min(0)
    # Mean score of the K entries from each entry on: of the whole block, where it is open.
    ahead_RW = (
        F.pad(scores_RW, (0, geometry.block_size - 1))
        .unfold(1, geometry.block_size, 1)
        .mean(dim=-1)
    )
    return torch.where(lods_RW == 0, ahead_RW, scores_RW).gather(1, covering)


def plan_of_blocks(blocks_Rn: Tensor, geometry: Geometry, wc_length: int) -> tuple[Tensor, Tensor]:
    """Return the plan `lods`, `starts` [R, W] of block LODs whose contexts have exactly `wc_length`
    entries.
    """
    rows, block = blocks_Rn.size(0), geometry.block_size
    places_n = torch.arange(blocks_Rn.size(1), device=blocks_Rn.device)
    # Entries up to the end of each block: an open block has K; of a gist's blocks the first has
    # the one entry.
    starts_node_Rn = places_n % block ** (blocks_Rn - 1).clamp_min(0) == 0
    ends_Rn = torch.where(blocks_Rn == 0, block, starts_node_Rn.long()).cumsum(dim=1)
    # The block of each of the E entries of the head.
    head_entries = wc_length - (geometry.seq_len - geometry.head_len)
    entries_RE = torch.arange(head_entries, device=blocks_Rn.device).expand(rows, -1).contiguous()
    block_RE = torch.searchsorted(ends_Rn, entries_RE, right=True).clamp_max(blocks_Rn.size(1) - 1)
    lods_RE = blocks_Rn.gather(1, block_RE)
    # A gist starts with its block; the K entries of an open block are the last ones up to its end.
    offset_RE = torch.where(lods_RE == 0, entries_RE - ends_Rn.gather(1, block_RE) + block, 0)
    # The tail follows, token by token.
    tail = torch.arange(geometry.head_len, geometry.seq_len, device=blocks_Rn.device)
    starts_RW = torch.cat([block_RE * block + offset_RE, tail.expand(rows, -1)], dim=1)
    return F.pad(lods_RE, (0, tail.size(0))), starts_RW


def units_used(blocks_Rn: Tensor, geometry: Geometry) -> Tensor:
    """Return how many units of K - 1 entries each row is shorter than the T tokens, int64 [R]."""
    total = torch.zeros_like(blocks_Rn[:, 0])
    for level in range(1, geometry.max_lod + 1):
        width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
        total += (blocks_Rn[:, : nodes * width : width] >= level).sum(dim=1)
    return total


def coarsest_blocks(rows: int, geometry: Geometry, device: torch.device) -> Tensor:
    """Return block LODs [R, n_1] of the coarsest full cover."""
    blocks = torch.ones(rows, geometry.head_nodes[1], dtype=torch.int64, device=device)
    for level in range(2, geometry.max_lod + 1):
        blocks[:, : geometry.head_nodes[level] * geometry.block_size ** (level - 1)] = level
    return blocks


def uniform_blocks(rows: int, geometry: Geometry, wc_length: int, device: torch.device) -> Tensor:
    """Return block LODs [R, n_1] of exactly `wc_length` entries: recent blocks open, all else as
    coarse as possible.

    Nodes are opened from the last one back, each completely before the one before it.
    """
    block = geometry.block_size
    blocks = coarsest_blocks(rows, geometry, device)
    units = geometry.max_units - geometry.units(wc_length)
    end = geometry.head_nodes[1]  # blocks from here on are open

    def open_whole(level: int, at_most: int) -> int:
        """Open as many of the last `at_most` level-l nodes as the units allow; return how many."""
        nonlocal units, end
        nodes = min(units // units_within(level, block), at_most)
        units -= nodes * units_within(level, block)
        end -= nodes * block ** (level - 1)
        return nodes

    # From the end of the head back: its nodes are finer there than at the beginning.
    for level, roots in enumerate(root_counts(geometry), start=1):
        if open_whole(level, roots) == roots:
            continue
        # The units left cannot open the next node completely: expand it and open its last children.
        while units:
            blocks[:, end - block ** (level - 1) : end] = level - 1
            units, level = units - 1, level - 1
            open_whole(level, block)
        break
    blocks[:, end:] = 0
    return blocks


def even_blocks(rows: int, geometry: Geometry, wc_length: int, device: torch.device) -> Tensor:
    """Return block LODs [R, n_1] of exactly `wc_length` entries whose levels of detail are as equal
    as possible.

    From the coarsest cover, all nodes of one level are expanded, the last first, before any of the
    next finer level. Focus starts here: the finer the gists it reads first, the smaller the facts
    that LensNet can see in them.
    """
    blocks = coarsest_blocks(rows, geometry, device)
    units = geometry.max_units - geometry.units(wc_length)
    for level in range(geometry.max_lod, 0, -1):
        nodes, width = geometry.head_nodes[level], geometry.block_size ** (level - 1)
        opened = min(units, nodes)
        blocks[:, (nodes - opened) * width : nodes * width] = level - 1
        units -= opened
        if opened < nodes:
            break
    return blocks


def open_nodes(blocks_Rn: Tensor, geometry: Geometry, chosen_Rn: Tensor) -> Tensor:
    """Return block LODs with every node above LOD1 expanded that holds a chosen block (bool [R,
    n_1]): chosen blocks are then at LOD1 or LOD0.
    """
    result = blocks_Rn
    for level in range(geometry.max_lod, 1, -1):
        width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
        holds = chosen_Rn[:, : nodes * width].unflatten(1, (nodes, width)).any(dim=-1)
        result = set_nodes(
            result, geometry, level, holds & expandable(result, geometry, level), level - 1
        )
    return result


def root_counts(geometry: Geometry) -> list[int]:
    """Return the number of nodes at levels 1 .. L in the head of the coarsest cover: those without
    a parent there.
    """
    nodes = [*geometry.head_nodes, 0]
    return [
        nodes[level] - nodes[level + 1] * geometry.block_size
        for level in range(1, geometry.max_lod + 1)
    ]


def units_within(level: int, block_size: int) -> int:
    """Return the number of units that opening a level-l node down to its tokens adds."""
    return (block_size**level - 1) // (block_size - 1)


def expandable(blocks_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Return which level-l nodes of the head are entries of the working context, bool [R, n_l]."""
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return blocks_Rn[:, : nodes * width : width] == level


def collapsible(blocks_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Return which level-l nodes of the head have all K children as entries, bool [R, n_l]."""
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return (blocks_Rn[:, : nodes * width].unflatten(1, (nodes, width)) == level - 1).all(dim=-1)


def set_nodes(
    blocks_Rn: Tensor, geometry: Geometry, level: int, chosen: Tensor, new_lod: int
) -> Tensor:
    """Return block LODs with the blocks under the `chosen` level-l nodes, bool [R, n_l], set to
    `new_lod`.
    """
    width = geometry.block_size ** (level - 1)
    under = chosen.repeat_interleave(width, dim=1)
    under = torch.nn.functional.pad(under, (0, blocks_Rn.size(1) - under.size(1)))
    return torch.where(under, torch.full_like(blocks_Rn, new_lod), blocks_Rn)
