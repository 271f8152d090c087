"""Telemetry of preference learning: how well LensNet's margins agree with the gains, and the shape
of the variants.

Gains, margins and plans are those before the update. Correlations and agreement are over all
ordered pairs of variants with decisions, whether or not the loss selects them; the baseline and
unusable rows are excluded. Source: docs/lensnet-pairwise-training.md, "Preference learning",
telemetry.

Legend: B sequences, G rows (baseline first), N variants (a and b index them), W entries, T tokens,
h horizon.
"""

import torch
from torch import Tensor

from mc_ds.geometry import Geometry
from mc_ds.metrics import Statistics
from mc_ds.preference.decisions import Decisions
from mc_ds.preference.objective import Rows, lod_sums, weighted_margin

ROUNDING = 1e-6
"""A spread below this fraction of its largest possible value is treated as rounding error."""


def record_scores(statistics: Statistics, scores: Tensor, horizon: int) -> None:
    """Record size and spread of the policy scores [R, W] over visible entries, as means over
    rows.
    """
    visible = scores[:, : scores.shape[1] - horizon].double()
    statistics.add_mean("mc/policy_score_abs_mean", visible.abs().mean(-1).sum(), visible.shape[0])
    statistics.add_mean(
        "mc/policy_score_std_mean", visible.std(-1, correction=0).sum(), visible.shape[0]
    )


def record_variants(
    statistics: Statistics, lods: Tensor, row_scores: Tensor, geometry: Geometry
) -> None:
    """Record the advantages over the baseline and the shape of the variants. `lods` are [B, G, W],
    `row_scores` [B, G].

    Advantages include a variant if its score and its baseline's are finite; `mc/nonfinite_rows`
    counts the rows whose score is not.
    """
    batch, rows, length = lods.shape
    variants = batch * (rows - 1)
    finite = row_scores.isfinite()
    usable = finite[:, 1:] & finite[:, :1]
    delta = torch.where(usable, row_scores[:, 1:].double() - row_scores[:, :1].double(), 0.0)
    statistics.add_samples("mc/adv_delta", delta, usable)
    statistics.add_sum("mc/nonfinite_rows", (~finite).sum())
    statistics.add_sum("mc/variants_total", variants)
    statistics.add_mean("mc/wc_length", length, 1)
    statistics.add_mean("mc/compression_ratio", geometry.seq_len, length)
    counts = torch.stack(
        [(lods[:, 1:] == level).sum(-1) for level in range(geometry.max_lod + 1)]
    ).double()  # [levels, B, N]
    for level, count in enumerate(counts):
        statistics.add_mean(f"mc/lod_count/{level}", count.sum(), variants)
        if level:
            weight = count * usable  # proportional to the share of tokens at the level
            statistics.add_mean(f"mc/lod_delta/{level}", (weight * delta).sum(), weight.sum())
    if geometry.max_lod >= 2:
        removed = counts[2].sum() * (geometry.block_size**2 - 1)
        statistics.add_mean("mc/lod2_share", removed, variants * (geometry.seq_len - length))


def record_preference(
    statistics: Statistics,
    decisions: Decisions,
    rows: Rows,
    gain: Tensor,
    usable: Tensor,
    geometry: Geometry,
) -> None:
    """Record how well margins agree with gains, over variants alone: `decisions` are [B, a, b, W],
    `rows` [B, N, W], `gain` and `usable` [B, a, b].
    """
    scores = rows.scores
    signed = decisions.expand - decisions.collapse
    mass = (decisions.expand + decisions.collapse).sum(-1)
    margin = weighted_margin(signed, scores, mass)
    agrees = 0.5 + 0.5 * margin.sign() * gain.sign()  # a margin of exactly 0 counts half
    decided = usable & (gain != 0)
    statistics.add_mean(
        "mc/preference_agreement", torch.where(decided, agrees, 0.0).sum(), decided.sum()
    )

    correlation, varies = _correlation(margin, -gain, usable, _margin_scale(scores, mass))
    statistics.add_mean("mc/preference_corr_mean", (correlation * varies).sum(), varies.sum())
    statistics.add_max("mc/preference_corr_max", correlation, varies)
    statistics.add_min("mc/preference_corr_min", correlation, varies)

    # The same correlation with every score replaced by the mean of its LOD.
    of_lod = _lod_means(rows, geometry)
    correlation, varies = _correlation(
        weighted_margin(signed, of_lod, mass), -gain, usable, _margin_scale(of_lod, mass)
    )
    statistics.add_mean("mc/preference_corr_lod_only", (correlation * varies).sum(), varies.sum())


def _lod_means(rows: Rows, geometry: Geometry) -> Tensor:
    """Replace each score by the batch's mean score of its LOD before the tail, [B, N, W]."""
    total, count = (part.sum((0, 1)) for part in lod_sums(rows, geometry))
    return (total / count.clamp_min(1))[rows.lods.long()]


def _margin_scale(scores: Tensor, mass: Tensor) -> Tensor:
    """Return an upper bound of the size of each sequence's margins, [B]: the largest |score| times
    the largest sqrt(mass).
    """
    return scores.abs().amax((1, 2)) * mass.amax((1, 2)).sqrt()


def _correlation(
    margin: Tensor, change: Tensor, usable: Tensor, margin_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the Pearson correlation of margin and score(b) - score(a) over the usable moves of
    each sequence, float64 [B], and whether it exists, bool [B].

    It is 0 and does not exist where margin or change has no variance beyond rounding.
    """
    weight = usable.flatten(1).double()
    count = weight.sum(1).clamp_min(1)

    def centred(values: Tensor) -> Tensor:
        flat = values.flatten(1).double()
        return (flat - (flat * weight).sum(1, keepdim=True) / count[:, None]) * weight

    x, y = centred(margin), centred(change)
    spread_x, spread_y = (x.square().sum(1) / count).sqrt(), (y.square().sum(1) / count).sqrt()
    varies = (spread_x > ROUNDING * margin_scale.double()) & (spread_y > 0)
    covariance = (x * y).sum(1) / count
    return torch.where(
        varies, covariance / torch.where(varies, spread_x * spread_y, 1.0), 0.0
    ), varies
