"""A full-coverage working context as the LOD of every head block, and the unit edits that keep it one.

Expanding a level-l node into its K children adds K - 1 entries, collapsing K sibling nodes into their parent removes as many: every edit
is one *unit*, so trading expansions against collapses one for one keeps the length exact, and coverage and alignment hold by construction.

Legend: R rows, W entries, T tokens, K block size, n_l whole level-l nodes of the head.
"""

import torch
from torch import Tensor

from mc_ds.geometry import Geometry, lod_map, start_counts


def block_lods(lods_RW: Tensor, starts_RW: Tensor, geometry: Geometry) -> Tensor:
    """LOD of every head block, int64 [R, n_1], of a full-coverage plan."""
    lods = lod_map(lods_RW, start_counts(starts_RW, geometry.seq_len))
    return lods[:, : geometry.head_len : geometry.block_size]


def block_scores(scores_RW: Tensor, starts_RW: Tensor, geometry: Geometry) -> Tensor:
    """Score of every head block [R, n_1]: the mean of its tokens' entries where it is open, else its gist's own."""
    covering = start_counts(starts_RW, geometry.seq_len)[:, 1:] - 1
    token_scores = scores_RW.gather(1, covering.clamp_min(0))[:, : geometry.head_len]
    return token_scores.unflatten(1, (-1, geometry.block_size)).mean(dim=-1)


def plan_of_blocks(blocks_Rn: Tensor, geometry: Geometry, wc_length: int) -> tuple[Tensor, Tensor]:
    """The plan `lods`, `starts` [R, W] of rows of exactly `wc_length` entries."""
    rows = blocks_Rn.size(0)
    token_lods = blocks_Rn.new_zeros(rows, geometry.seq_len)
    token_lods[:, : geometry.head_len] = blocks_Rn.repeat_interleave(geometry.block_size, dim=1)
    positions = torch.arange(geometry.seq_len, device=blocks_Rn.device)
    starts_entry = positions % geometry.block_size**token_lods == 0
    # The first wc_length positions of a stable sort by "starts no entry" are the starts, in order.
    order = (~starts_entry).to(torch.uint8).sort(dim=1, stable=True).indices[:, :wc_length]
    return token_lods.gather(1, order), order


def units_used(blocks_Rn: Tensor, geometry: Geometry) -> Tensor:
    """Units of K - 1 entries that each row's collapses have removed, int64 [R]."""
    total = torch.zeros_like(blocks_Rn[:, 0])
    for level in range(1, geometry.max_lod + 1):
        width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
        total += (blocks_Rn[:, : nodes * width : width] >= level).sum(dim=1)
    return total


def coarsest_blocks(rows: int, geometry: Geometry, device: torch.device) -> Tensor:
    """Block LODs [R, n_1] of the coarsest full cover."""
    blocks = torch.ones(rows, geometry.head_nodes[1], dtype=torch.int64, device=device)
    for level in range(2, geometry.max_lod + 1):
        blocks[:, : geometry.head_nodes[level] * geometry.block_size ** (level - 1)] = level
    return blocks


def expandable(blocks_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Which level-l nodes of the head stand in the working context, bool [R, n_l]."""
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return blocks_Rn[:, : nodes * width : width] == level


def collapsible(blocks_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Which level-l nodes of the head have all K children in the working context, bool [R, n_l]."""
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return (blocks_Rn[:, : nodes * width].unflatten(1, (nodes, width)) == level - 1).all(dim=-1)


def set_nodes(blocks_Rn: Tensor, geometry: Geometry, level: int, chosen: Tensor, new_lod: int) -> Tensor:
    """Block LODs with the blocks under the `chosen` level-l nodes, bool [R, n_l], set to `new_lod`."""
    width = geometry.block_size ** (level - 1)
    under = chosen.repeat_interleave(width, dim=1)
    under = torch.nn.functional.pad(under, (0, blocks_Rn.size(1) - under.size(1)))
    return torch.where(under, torch.full_like(blocks_Rn, new_lod), blocks_Rn)
