"""Full-coverage working contexts, represented by the LOD of every head block, and edits of them.

Expanding a level-l node into its K children adds K - 1 entries; collapsing K siblings into their
parent removes K - 1. Each is one *unit*, so trading one expansion for one collapse leaves the
length unchanged. Block LODs always describe a context that covers the history with aligned spans.

Legend: R rows, W entries, T tokens, K block size, n_l complete level-l nodes of the head, n = n_1
head blocks, E entries of the head. An *open* block is read token by token, at LOD0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.geometry import Geometry


def covering_entries(starts_RW: Tensor, geometry: Geometry) -> Tensor:
    """Return, for each head block, the index in its row of the entry that covers the block's first
    token, int64 [R, n_1]; -1 where none does.
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
    tokens if it is open, else the score of the gist that covers it.
    """
    covering = covering_entries(starts_RW, geometry).clamp_min(0)
    # Mean score of each entry and the K - 1 after it: for the first entry of an open block this
    # is the mean over the block.
    ahead_RW = (
        F.pad(scores_RW, (0, geometry.block_size - 1))
        .unfold(1, geometry.block_size, 1)
        .mean(dim=-1)
    )
    return torch.where(lods_RW == 0, ahead_RW, scores_RW).gather(1, covering)


def plan_of_blocks(blocks_Rn: Tensor, geometry: Geometry, wc_length: int) -> tuple[Tensor, Tensor]:
    """Return the plan `lods`, `starts` [R, W] of block LODs `blocks_Rn` whose contexts have exactly
    `wc_length` entries.
    """
    rows, block = blocks_Rn.size(0), geometry.block_size
    places_n = torch.arange(blocks_Rn.size(1), device=blocks_Rn.device)
    # Number of entries up to the end of each block. An open block has K entries; a gist counts
    # for the first of its blocks.
    starts_node_Rn = places_n % block ** (blocks_Rn - 1).clamp_min(0) == 0
    ends_Rn = torch.where(blocks_Rn == 0, block, starts_node_Rn.long()).cumsum(dim=1)
    # The block of each of the E entries of the head.
    head_entries = wc_length - (geometry.seq_len - geometry.head_len)
    entries_RE = torch.arange(head_entries, device=blocks_Rn.device).expand(rows, -1).contiguous()
    block_RE = torch.searchsorted(ends_Rn, entries_RE, right=True).clamp_max(blocks_Rn.size(1) - 1)
    lods_RE = blocks_Rn.gather(1, block_RE)
    # A gist starts at its block's first token. The K entries of an open block are its K tokens.
    offset_RE = torch.where(lods_RE == 0, entries_RE - ends_Rn.gather(1, block_RE) + block, 0)
    # Append the tail, token by token.
    tail = torch.arange(geometry.head_len, geometry.seq_len, device=blocks_Rn.device)
    starts_RW = torch.cat([block_RE * block + offset_RE, tail.expand(rows, -1)], dim=1)
    return F.pad(lods_RE, (0, tail.size(0))), starts_RW


def units_used(blocks_Rn: Tensor, geometry: Geometry) -> Tensor:
    """Return the number of units of K - 1 entries by which each row is shorter than T, int64
    [R].
    """
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
    """Return block LODs [R, n_1] of exactly `wc_length` entries: recent blocks open, all others as
    coarse as possible.

    Nodes are opened from the last one backwards, each completely before the next.
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

    # From the end of the head backwards: the coarsest cover has its finest nodes at the end.
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
    """Return block LODs [R, n_1] of exactly `wc_length` entries whose levels of detail differ as
    little as possible.

    Starting from the coarsest cover, all nodes of one level are expanded, the last one first,
    before any node of the next finer level. Focus starts from this cover: LensNet can see smaller
    facts in finer gists.
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
    """Return block LODs in which every node above LOD1 that holds a chosen block (bool [R, n_1]) is
    expanded, so that chosen blocks are at LOD1 or LOD0.
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
    """Return the number of entries at levels 1 .. L in the head of the coarsest cover."""
    nodes = [*geometry.head_nodes, 0]
    return [
        nodes[level] - nodes[level + 1] * geometry.block_size
        for level in range(1, geometry.max_lod + 1)
    ]


def units_within(level: int, block_size: int) -> int:
    """Return the number of units that are added by opening a level-l node down to its tokens."""
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
    """Return block LODs in which all blocks under the `chosen` level-l nodes (bool [R, n_l]) have
    LOD `new_lod`.
    """
    width = geometry.block_size ** (level - 1)
    under = chosen.repeat_interleave(width, dim=1)
    under = torch.nn.functional.pad(under, (0, blocks_Rn.size(1) - under.size(1)))
    return torch.where(under, torch.full_like(blocks_Rn, new_lod), blocks_Rn)
