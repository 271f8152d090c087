"""A full-coverage working context as the LOD of every head block, and the unit edits that keep it
one.

Expanding a level-l node into its K children adds K - 1 entries, collapsing K sibling nodes into
their parent removes as many: every edit is one *unit*, so trading expansions against collapses one
for one keeps the length exact, and coverage and alignment hold by construction.

Legend: R rows, W entries, T tokens, K block size, n_l whole level-l nodes of the head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.geometry import Geometry


def covering_entries(starts_RW: Tensor, geometry: Geometry) -> Tensor:
    """Place in the row of the entry that covers each head block's first token, int64 [R, n_1]; -1
    where no entry does.
    """
    firsts = torch.arange(0, geometry.head_len, geometry.block_size, device=starts_RW.device)
    rows = starts_RW.size(0)
    return (
        torch.searchsorted(starts_RW.contiguous(), firsts.expand(rows, -1).contiguous(), right=True)
        - 1
    )


def block_lods(lods_RW: Tensor, starts_RW: Tensor, geometry: Geometry) -> Tensor:
    """Return LOD of every head block, int64 [R, n_1], of a plan; -1 where no entry covers it."""
    covering = covering_entries(starts_RW, geometry)
    lods = lods_RW.long().gather(1, covering.clamp_min(0))
    return lods.masked_fill(covering < 0, -1)


def block_scores(
    scores_RW: Tensor, lods_RW: Tensor, starts_RW: Tensor, geometry: Geometry
) -> Tensor:
    """Score of every head block [R, n_1] of a full-coverage plan: the mean of its tokens' scores
    where it is open, else its gist's own.
    """
    covering = covering_entries(starts_RW, geometry).clamp_min(0)
    ahead = (
        F.pad(scores_RW, (0, geometry.block_size - 1))
        .unfold(1, geometry.block_size, 1)
        .mean(dim=-1)
    )  # of K entries from each on
    return torch.where(lods_RW == 0, ahead, scores_RW).gather(1, covering)


def plan_of_blocks(blocks_Rn: Tensor, geometry: Geometry, wc_length: int) -> tuple[Tensor, Tensor]:
    """Return the plan `lods`, `starts` [R, W] of rows of exactly `wc_length` entries."""
    rows, block = blocks_Rn.size(0), geometry.block_size
    places = torch.arange(blocks_Rn.size(1), device=blocks_Rn.device)
    starts_node = places % block ** (blocks_Rn - 1).clamp_min(0) == 0
    ends = torch.where(blocks_Rn == 0, block, starts_node.long()).cumsum(
        dim=1
    )  # entries up to the end of each block
    head_entries = wc_length - (geometry.seq_len - geometry.head_len)
    entries = torch.arange(head_entries, device=blocks_Rn.device).expand(rows, -1).contiguous()
    of_entry = torch.searchsorted(ends, entries, right=True).clamp_max(blocks_Rn.size(1) - 1)
    lods = blocks_Rn.gather(1, of_entry)
    # The K entries of an open block are its last ones up to its end; a gist starts with its block.
    offset = torch.where(lods == 0, entries - ends.gather(1, of_entry) + block, 0)
    tail = torch.arange(geometry.head_len, geometry.seq_len, device=blocks_Rn.device).expand(
        rows, -1
    )
    return F.pad(lods, (0, tail.size(1))), torch.cat([of_entry * block + offset, tail], dim=1)


def units_used(blocks_Rn: Tensor, geometry: Geometry) -> Tensor:
    """Return the units of K - 1 entries that each row's collapses have removed, int64 [R]."""
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
    """Return block LODs [R, n_1] of the coarsest cover with the most recent detail opened up to
    exactly `wc_length` entries.

    Nodes are opened from the last one back, each with all below it before the one before it.
    """
    block = geometry.block_size
    blocks = coarsest_blocks(rows, geometry, device)
    units = geometry.max_units - geometry.units(wc_length)
    end = geometry.head_nodes[1]  # blocks from here on are open

    def open_whole(level: int, at_most: int) -> int:
        nonlocal units, end
        nodes = min(units // units_within(level, block), at_most)
        units -= nodes * units_within(level, block)
        end -= nodes * block ** (level - 1)
        return nodes

    for level, roots in enumerate(root_counts(geometry), start=1):
        if open_whole(level, roots) == roots:
            continue
        # Not enough for the whole next node: it is expanded, and its last children are opened.
        while units:
            blocks[:, end - block ** (level - 1) : end] = level - 1
            units, level = units - 1, level - 1
            open_whole(level, block)
        break
    blocks[:, end:] = 0
    return blocks


def even_blocks(rows: int, geometry: Geometry, wc_length: int, device: torch.device) -> Tensor:
    """Return block LODs [R, n_1] of exactly `wc_length` entries with levels of detail that differ
    as little as they can.

    From the coarsest cover each level in turn is expanded, from its last node back, before any node
    of the next. This is where focus starts from: the finer the gists it reads first, the smaller
    the facts that LensNet can see in them.
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
    """Return block LODs with every node above LOD1 that holds a chosen block, bool [R, n_1],
    expanded: chosen blocks stand at LOD1 or LOD0.
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
    """Return the nodes of the coarsest cover's head at levels 1 .. L: those without a parent in the
    head.
    """
    nodes = [*geometry.head_nodes, 0]
    return [
        nodes[level] - nodes[level + 1] * geometry.block_size
        for level in range(1, geometry.max_lod + 1)
    ]


def units_within(level: int, block_size: int) -> int:
    """Return the units that opening a level-l node down to its tokens adds."""
    return (block_size**level - 1) // (block_size - 1)


def expandable(blocks_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Return which level-l nodes of the head stand in the working context, bool [R, n_l]."""
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return blocks_Rn[:, : nodes * width : width] == level


def collapsible(blocks_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Return which level-l nodes of the head have all K children in the working context, bool [R,
    n_l].
    """
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
