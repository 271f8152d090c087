"""One round of edits: the best expansions against the cheapest collapses, at an exact budget, for
all rows at once.

The value of expanding a node is its score. Collapsing K siblings costs the mean of an open block's
entries at level 1 (a collapse's weight is shared by its entries), and above it the largest value
among the children. A trade is made while value exceeds cost by more than the threshold, so every
chosen expansion is worth more than every chosen collapse costs: no chosen collapse can contain a
chosen expansion.

Legend: R rows, n_1 head blocks, K block size.
"""

import torch
from torch import Tensor

from mc_ds.focus.cover import collapsible, expandable, set_nodes
from mc_ds.geometry import Geometry


def trade(
    blocks_Rn: Tensor,
    values_Rn: Tensor,
    frozen_Rn: Tensor,
    geometry: Geometry,
    *,
    spare_units_R: Tensor,
    threshold: float,
    max_replacements: int,
    edit_penalty_Rn: Tensor | None = None,
    expand_up_to: int | None = None,
) -> Tensor:
    """Return new block LODs after one round.

    `values_Rn` scores every block (`block_scores`, with memory); blocks of `frozen_Rn` are not
    edited. `spare_units_R` units of budget are free: as many expansions need no collapse; where
    negative, as many collapses are forced, whatever they cost. `edit_penalty_Rn` >= 0 is taken off
    what expanding a block is worth and added to what collapsing it costs. `expand_up_to`: coarser
    nodes stay.
    """
    levels = range(1, geometry.max_lod + 1)
    values = [_node_values(values_Rn, geometry, level) for level in levels]
    frozen = [_any_block(frozen_Rn, geometry, level) for level in levels]
    holds = [
        0.0 if edit_penalty_Rn is None else _node_values(edit_penalty_Rn, geometry, level)
        for level in levels
    ]
    highest = geometry.max_lod if expand_up_to is None else expand_up_to
    gain = [
        torch.where(
            expandable(blocks_Rn, geometry, level) & ~f & (level <= highest), v - r, -torch.inf
        )
        for level, v, r, f in zip(levels, values, holds, frozen, strict=True)
    ]
    cost = [
        torch.where(collapsible(blocks_Rn, geometry, level) & ~f, v + r, torch.inf)
        for level, v, r, f in zip(levels, values, holds, frozen, strict=True)
    ]
    expanded, collapsed = _choose(
        torch.cat(gain, 1), torch.cat(cost, 1), spare_units_R, threshold, max_replacements
    )
    sizes = [v.size(1) for v in values]
    result = blocks_Rn
    for level, expand, collapse in zip(
        levels, expanded.split(sizes, 1), collapsed.split(sizes, 1), strict=True
    ):
        result = set_nodes(result, geometry, level, expand, level - 1)
        result = set_nodes(result, geometry, level, collapse, level)
    return result


def _choose(
    gain_RN: Tensor, cost_RN: Tensor, spare_R: Tensor, threshold: float, most: int
) -> tuple[Tensor, Tensor]:
    """Return masks [R, N] of the expansions and collapses that one round makes."""
    gains, gain_order = gain_RN.sort(dim=1, descending=True, stable=True)
    costs, cost_order = cost_RN.sort(dim=1, stable=True)
    rank = torch.arange(gain_RN.size(1), device=gain_RN.device)[None]
    free, forced = spare_R.clamp_min(0)[:, None], (-spare_R).clamp_min(0)[:, None]
    # Trade k pairs the k-th expansion after the free ones with the k-th collapse after the forced
    # ones.
    last = gain_RN.size(1) - 1
    paired_gain = gains.gather(1, (rank + free).clamp_max(last)).masked_fill(
        rank + free > last, -torch.inf
    )
    paired_cost = costs.gather(1, (rank + forced).clamp_max(last)).masked_fill(
        rank + forced > last, torch.inf
    )
    traded = ((paired_gain - paired_cost > threshold) & (rank < most)).sum(dim=1, keepdim=True)
    expand = (rank < free + traded) & (gains > -torch.inf)
    collapse = (rank < forced + traded) & (costs < torch.inf)
    none = torch.zeros_like(expand)
    return none.scatter(1, gain_order, expand), none.scatter(1, cost_order, collapse)


def _node_values(values_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Return the value of each level-l node [R, n_l]: the largest among its blocks (all equal where
    the node itself stands in the context).
    """
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return values_Rn[:, : nodes * width].unflatten(1, (nodes, width)).amax(dim=-1)


def _any_block(mask_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Return which level-l nodes hold a masked block, bool [R, n_l]."""
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return mask_Rn[:, : nodes * width].unflatten(1, (nodes, width)).any(dim=-1)
