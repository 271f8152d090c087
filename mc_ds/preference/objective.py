"""Margins of moves, and the loss terms computed from them.

The margin of a move says how much LensNet prefers it; the sign of its gain is the label. All sums
are elementwise products and reductions, never matrix products, so that neither autocast nor TF32
lowers their precision.

Legend: B sequences, G rows of a sequence (a and b index them), W entries, w weight and d sign of a
decision (`decisions`). Source: docs/lensnet-pairwise-training.md, "Preference learning".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.geometry import Geometry, spans
from mc_ds.preference.decisions import Decisions

MIN_ENTRIES = 4
"""In a row with fewer gists of a LOD than this, they are centred by the mean of all gists."""


class Rows(NamedTuple):
    """Scores and plans of rows, [B, G, W] each."""

    scores: Tensor
    lods: Tensor
    starts: Tensor


class Margins(NamedTuple):
    """Margins of all moves and the total weight of their decisions, [B, a, b] each."""

    joint: Tensor
    """m = sum_i w_i d_i score_i / sqrt(sum_i w_i)."""
    expand: Tensor
    """m_up, the margin of centred scores over expansions alone."""
    collapse: Tensor
    """m_dn, the margin of centred scores over collapses alone."""
    expand_mass: Tensor
    """Sum of w over expansions; 0 if there are none."""
    collapse_mass: Tensor
    """Sum of w over collapses; 0 if there are none."""


def weighted_margin(weights: Tensor, scores: Tensor, mass: Tensor) -> Tensor:
    """Return sum_i weights_i score_i / sqrt(mass), [B, a, b]; 0 for a move without decisions.
    `weights` are [B, a, b, W], `scores` of row a [B, a, W], `mass` [B, a, b].
    """
    return (weights * scores[:, :, None]).sum(-1) / torch.where(mass > 0, mass, 1.0).sqrt()


def margins(decisions: Decisions, rows: Rows, geometry: Geometry) -> Margins:
    """Return the joint and one-sided margins of every move."""
    centred = centre_per_lod(rows, geometry)
    expand_mass, collapse_mass = decisions.expand.sum(-1), decisions.collapse.sum(-1)
    return Margins(
        joint=weighted_margin(
            decisions.expand - decisions.collapse, rows.scores, expand_mass + collapse_mass
        ),
        expand=weighted_margin(decisions.expand, centred, expand_mass),
        collapse=-weighted_margin(decisions.collapse, centred, collapse_mass),
        expand_mass=expand_mass,
        collapse_mass=collapse_mass,
    )


def lod_sums(rows: Rows, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return sum and number of each row's scores per LOD before the tail, [B, G, max_lod + 1]
    each.
    """
    levels = torch.arange(geometry.max_lod + 1, device=rows.lods.device)
    in_head = rows.starts < geometry.head_len
    of_level = (rows.lods[..., None] == levels) & in_head[..., None]
    return (of_level * rows.scores[..., None]).sum(-2), of_level.sum(-2)


def centre_per_lod(rows: Rows, geometry: Geometry) -> Tensor:
    """Subtract from each score the mean score of its LOD in its row, taken before the tail: [B, G,
    W].

    LODs above 0 with fewer than `MIN_ENTRIES` entries use the mean of all gists of the row. With
    centred scores, counting nodes per LOD cannot lower the loss.
    """
    total, count = lod_sums(rows, geometry)
    all_gists = total[..., 1:].sum(-1, keepdim=True) / count[..., 1:].sum(
        -1, keepdim=True
    ).clamp_min(1)
    few_gists = count < MIN_ENTRIES
    few_gists[..., 0] = False
    # Mean per LOD, [B, G, levels]; of all gists where there are few.
    centre = torch.where(few_gists, all_gists, total / count.clamp_min(1))
    of_level = rows.lods[..., None] == torch.arange(centre.size(-1), device=centre.device)
    # Not gather: on a GPU it adds up gradients in a random order.
    return rows.scores - torch.where(of_level, centre[..., None, :], 0).sum(-1)


def pair_terms(m: Margins, sign: Tensor, config: MCConfig) -> Tensor:
    """Return the signed Bradley-Terry loss of every move, [B, a, b]; `sign` [B, a, b] is that of
    its gain.

    With `lens_split_margins` this is a weighted mean over the joint and the two one-sided margins:
    collapses have weight `lens_collapse_weight`, a side without decisions is left out.
    """

    def logistic(margin: Tensor) -> Tensor:
        return F.softplus(-sign * margin / config.lens_temperature)

    if not config.lens_split_margins:
        return logistic(m.joint)
    expand = (m.expand_mass > 0).to(sign.dtype)
    collapse = (m.collapse_mass > 0).to(sign.dtype) * config.lens_collapse_weight
    return (logistic(m.joint) + expand * logistic(m.expand) + collapse * logistic(m.collapse)) / (
        1 + expand + collapse
    )


def entry_terms(decisions: Decisions, scores: Tensor, sign: Tensor, config: MCConfig) -> Tensor:
    """Return the logistic loss per entry of every move, averaged over its decisions by weight, [B,
    a, b]. The weights of collapses are multiplied by `lens_collapse_weight`.
    """
    weights = decisions.expand + config.lens_collapse_weight * decisions.collapse
    # Label: the sign of the gain, inverted for collapses.
    label = torch.where(decisions.collapse > 0, -sign[..., None], sign[..., None])
    losses = F.softplus(-label * scores[:, :, None] / config.lens_temperature)
    total = weights.sum(-1)
    return (weights * losses).sum(-1) / torch.where(total > 0, total, 1.0)


def rank_terms(joint: Tensor, sign: Tensor, config: MCConfig) -> Tensor:
    """Return the hinge loss max(0, lens_margin - sign * m) of every move, [B, a, b]."""
    return F.relu(config.lens_margin - sign * joint)


def budget_imbalance(rows: Rows, geometry: Geometry) -> Tensor:
    """Return the squared span-weighted mean score of each row before the tail, [B, G, 1].

    This mean is the mass of positive scores minus that of negative ones: 0 where expansion and
    collapse are balanced.
    """
    in_head = rows.starts < geometry.head_len
    span = torch.where(in_head, spans(rows.lods, geometry.block_size), 0)
    return (
        (span * rows.scores).sum(-1, keepdim=True) / span.sum(-1, keepdim=True).clamp_min(1)
    ).square()
