"""What LensNet is asked about a move: margins, and the terms of the loss they make.

A margin says how much LensNet likes a move; the sign of the gain says whether it should. All
sums are products and reductions, never matrix products, so that neither autocast nor TF32 lowers
their precision.

Legend: B sequences, G rows of a sequence (a and b index them), W entries. Source:
docs/lensnet-pairwise-training.md, "Preference learning".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.geometry import Geometry, spans
from mc_ds.preference.decisions import Decisions

MIN_ENTRIES = 4
"""Gists of a LOD with fewer entries in a row are centred by the mean of all its gists."""


class Rows(NamedTuple):
    """Scored rows: all [B, G, W]."""

    scores: Tensor
    lods: Tensor
    starts: Tensor


class Margins(NamedTuple):
    """Margins of all moves and the decision mass behind each, [B, a, b]."""

    joint: Tensor
    """m = sum_i w_i d_i score_i / sqrt(sum_i w_i)."""
    expand: Tensor
    """m_up, over expansions alone, of centred scores."""
    collapse: Tensor
    """m_dn, over collapses alone, of centred scores."""
    expand_mass: Tensor
    """Sum of w over expansions; 0: the move has none."""
    collapse_mass: Tensor
    """Sum of w over collapses; 0: the move has none."""


def weighted_margin(weights: Tensor, scores: Tensor, mass: Tensor) -> Tensor:
    """Return sum_i weights_i score_i / sqrt(mass), [B, a, b]; 0 where a move decides nothing.
    `weights` [B, a, b, W], `scores` [B, a, W] of row a.
    """
    return (weights * scores[:, :, None]).sum(-1) / torch.where(mass > 0, mass, 1.0).sqrt()


def margins(decisions: Decisions, rows: Rows, geometry: Geometry) -> Margins:
    """Return the margins of every move, joint and one-sided."""
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
    """Return the sum and the number of each row's scores per LOD outside the tail, [B, G,
    max_lod + 1] each.
    """
    levels = torch.arange(geometry.max_lod + 1, device=rows.lods.device)
    in_head = rows.starts < geometry.head_len
    of_level = ((rows.lods[..., None] == levels) & in_head[..., None]).to(rows.scores.dtype)
    return (of_level * rows.scores[..., None]).sum(-2), of_level.sum(-2)


def centre_per_lod(rows: Rows, geometry: Geometry) -> Tensor:
    """Subtract from each score the mean score of its LOD in its row, outside the tail: [B, G, W].

    Gists of a LOD with fewer than four entries use the mean of all gists of the row. Counting nodes
    per LOD can then not lower the loss.
    """
    total, count = lod_sums(rows, geometry)
    all_gists = total[..., 1:].sum(-1, keepdim=True) / count[..., 1:].sum(
        -1, keepdim=True
    ).clamp_min(1)
    few_gists = count < MIN_ENTRIES
    few_gists[..., 0] = False
    centre = torch.where(few_gists, all_gists, total / count.clamp_min(1))
    of_level = rows.lods[..., None] == torch.arange(centre.size(-1), device=centre.device)
    # gather would add up its gradients in any order on a GPU
    return rows.scores - torch.where(of_level, centre[..., None, :], 0).sum(-1)


def pair_terms(m: Margins, sign: Tensor, config: MCConfig) -> Tensor:
    """Return the signed Bradley-Terry loss of every move, [B, a, b]; `sign` [B, a, b] is its
    gain's.

    With `lens_split_margins` the mean over the joint and both one-sided margins: a side without
    decisions is left out, and collapses count `lens_collapse_weight` against expansions.
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
    """Return the logistic loss of every move entry by entry, [B, a, b]: the mean over its
    decisions by weight, collapses times `lens_collapse_weight`.
    """
    weights = decisions.expand + config.lens_collapse_weight * decisions.collapse
    wanted = torch.where(decisions.collapse > 0, -sign[..., None], sign[..., None])
    losses = F.softplus(-wanted * scores[:, :, None] / config.lens_temperature)
    total = weights.sum(-1)
    return (weights * losses).sum(-1) / torch.where(total > 0, total, 1.0)


def rank_terms(joint: Tensor, sign: Tensor, config: MCConfig) -> Tensor:
    """Return the hinge loss max(0, lens_margin - sign * m) of every move, [B, a, b]."""
    return F.relu(config.lens_margin - sign * joint)


def budget_imbalance(rows: Rows, geometry: Geometry) -> Tensor:
    """Return the squared difference of a row's expand mass and collapse mass, [B, G, 1].

    The masses are the positive and the negative scores outside the tail, weighted by span and
    divided by all spans there: their difference is the span-weighted mean score.
    """
    in_head = rows.starts < geometry.head_len
    span = torch.where(in_head, spans(rows.lods, geometry.block_size), 0).to(rows.scores.dtype)
    return (
        (span * rows.scores).sum(-1, keepdim=True) / span.sum(-1, keepdim=True).clamp_min(1)
    ).square()
