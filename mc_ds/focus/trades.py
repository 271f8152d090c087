"""One round of edits: trades the best expansions for the cheapest collapses, at an exact length, in
all rows at once.

Expanding a node gains its score. Collapsing K siblings costs, at level 1, the mean score of the
block's tokens, and above it the largest score among the children. Expansions and collapses are
paired, the best expansion with the cheapest collapse; a pair is applied if the gain exceeds the
cost by more than the threshold. Every chosen expansion then gains more than any chosen collapse
costs, so no chosen collapse can contain a chosen expansion.

Legend: R rows, K block size, n (n_1) head blocks, n_l nodes of level l, N = n_1 + n_2 + ... nodes
of all levels.
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
    """Return the block LODs [R, n_1] after one round.

    * `values_Rn`: a score per block, as from `block_scores`.
    * `frozen_Rn`: blocks that must not be edited.
    * `spare_units_R`: number of expansions that need no collapse; if negative, the number of
      collapses that are made at any cost.
    * `max_replacements`: largest number of trades.
    * `edit_penalty_Rn` >= 0: subtracted from the gain of expanding a block, added to the cost of
      collapsing it.
    * `expand_up_to`: nodes above this level are not expanded; None: no limit.
    """
    levels = range(1, geometry.max_lod + 1)
    highest = geometry.max_lod if expand_up_to is None else expand_up_to
    gains, costs = [], []
    for level in levels:
        # Values, penalties and the frozen mask of this level's nodes, [R, n_l].
        value = _node_values(values_Rn, geometry, level)
        frozen = _any_block(frozen_Rn, geometry, level)
        penalty = (
            torch.zeros_like(value)
            if edit_penalty_Rn is None
            else _node_values(edit_penalty_Rn, geometry, level)
        )
        # Nodes that cannot be expanded gain -inf; those that cannot be collapsed cost inf.
        may_expand = expandable(blocks_Rn, geometry, level) & ~frozen & (level <= highest)
        may_collapse = collapsible(blocks_Rn, geometry, level) & ~frozen
        gains.append(torch.where(may_expand, value - penalty, -torch.inf))
        costs.append(torch.where(may_collapse, value + penalty, torch.inf))
    # All levels compete in one ranking, [R, N].
    expanded, collapsed = _choose(
        torch.cat(gains, 1), torch.cat(costs, 1), spare_units_R, threshold, max_replacements
    )
    # Apply the chosen edits of each level to the blocks below its nodes.
    sizes = [gain.size(1) for gain in gains]
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
    """Return masks [R, N] of the expansions and collapses of one round: the `spare_R` free
    expansions or forced collapses, and at most `most` trades.
    """
    # Sort: best expansions and cheapest collapses first.
    gains, gain_order = gain_RN.sort(dim=1, descending=True, stable=True)
    costs, cost_order = cost_RN.sort(dim=1, stable=True)
    rank = torch.arange(gain_RN.size(1), device=gain_RN.device)[None]
    free, forced = spare_R.clamp_min(0)[:, None], (-spare_R).clamp_min(0)[:, None]
    # Skip the free expansions and forced collapses. Pair the k-th remaining expansion with the
    # k-th remaining collapse.
    last = gain_RN.size(1) - 1
    paired_gain = gains.gather(1, (rank + free).clamp_max(last)).masked_fill(
        rank + free > last, -torch.inf
    )
    paired_cost = costs.gather(1, (rank + forced).clamp_max(last)).masked_fill(
        rank + forced > last, torch.inf
    )
    # Gains fall and costs rise with k, so the worthwhile trades come first: count them.
    traded = ((paired_gain - paired_cost > threshold) & (rank < most)).sum(dim=1, keepdim=True)
    expand = (rank < free + traded) & (gains > -torch.inf)
    collapse = (rank < forced + traded) & (costs < torch.inf)
    # Map sorted ranks back to nodes.
    none = torch.zeros_like(expand)
    return none.scatter(1, gain_order, expand), none.scatter(1, cost_order, collapse)


def _node_values(values_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Return the value of each level-l node [R, n_l]: the largest of its blocks' values. They are
    all equal if the node is an entry.
    """
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return values_Rn[:, : nodes * width].unflatten(1, (nodes, width)).amax(dim=-1)


def _any_block(mask_Rn: Tensor, geometry: Geometry, level: int) -> Tensor:
    """Return which level-l nodes contain a masked block, bool [R, n_l]."""
    width, nodes = geometry.block_size ** (level - 1), geometry.head_nodes[level]
    return mask_Rn[:, : nodes * width].unflatten(1, (nodes, width)).any(dim=-1)
