"""The preference loss: trains LensNet on pairs of random variants of one sequence.

The decisions of every move give margins, the margins give loss terms, and each term is weighted by
the size of the move's gain. The loss is one ratio of sums over moves. To combine micro-steps and
ranks, backpropagate each numerator, add up gradients and denominators, and divide once.

Legend: B sequences, G rows of a sequence, R = B*G rows, W entries, a -> b a move between rows, g
the gain of a move, v its weight. Source: docs/lensnet-pairwise-training.md, "Preference learning".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.geometry import lod1_cover
from mc_ds.metrics import FlatStatistics, Statistics
from mc_ds.preference.decisions import Decisions, decide, decide_blocks
from mc_ds.preference.objective import (
    Rows,
    budget_imbalance,
    entry_terms,
    margins,
    pair_terms,
    rank_terms,
)
from mc_ds.preference.pairs import gains, move_weights, pairs_kept, select_pairs
from mc_ds.preference.state import GainMoments, gain_std
from mc_ds.preference.telemetry import record_preference, record_scores, record_variants


class PreferenceParts(NamedTuple):
    """Loss and telemetry of one micro-batch, as tensors. Only `numerator` has a gradient."""

    numerator: Tensor
    """Sum over moves of v times the loss of the move, 0-d."""
    denominator: Tensor
    """Sum over moves of v, 0-d."""
    gain_moments: Tensor
    """Sum of g^2 and number of all moves with decisions, selected or not, float64 [2]: the
    arguments of `GainMoments.update`.
    """
    statistics: FlatStatistics
    """Metrics in parts that reduce exactly over micro-steps and ranks."""


@dataclass(frozen=True)
class PreferenceResult:
    """Loss and telemetry of one micro-batch. Only `loss` and `numerator` have gradients."""

    numerator: Tensor
    """See `PreferenceParts`."""
    denominator: Tensor
    """See `PreferenceParts`."""
    gain_moments: Tensor
    """See `PreferenceParts`."""
    statistics: Statistics
    """Metrics in parts that reduce exactly over micro-steps and ranks."""

    @property
    def loss(self) -> Tensor:
        """numerator / denominator, 0-d; 0 if all moves have weight 0."""
        return self.numerator / torch.where(self.denominator > 0, self.denominator, 1.0)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Finished metrics of this micro-batch by full name, float64 0-d; 0 for metrics without
        values.
        """
        return self.statistics.values()


def preference_loss(
    scores: Tensor,
    lods: Tensor,
    starts: Tensor,
    row_scores: Tensor,
    *,
    rows_per_sequence: int,
    config: MCConfig,
    state: GainMoments | None = None,
) -> PreferenceResult:
    """Return the signed preference loss over all pairs of variants. Computed in float32 or float64;
    never synchronises with the host.

    * `scores` [R, W]: LensNet's scores, 0 in the horizon, which LensNet does not see; with
      `random_blocks` [B, n_1 + tail], those of the LOD1 cover.
    * `lods`, `starts` [R, W]: the plan. Rows of a sequence are adjacent, the baseline first.
    * `row_scores` [R]: horizon losses in nats.
    * `state`: running moments of the gains before this step; None: those of this batch are used.

    Rows with a non-finite row score are ignored and counted by `mc/nonfinite_rows`; a non-finite
    policy score makes the loss non-finite. Raises ValueError for mismatched shapes.
    """
    return PreferenceLoss(config, rows_per_sequence)(
        scores, lods, starts, row_scores, state.moments if state is not None else None
    )


class PreferenceLoss:
    """`preference_loss` for a fixed number of rows per sequence.

    `function` may be replaced by an equivalent, such as its CUDA graph.
    """

    def __init__(self, config: MCConfig, rows_per_sequence: int) -> None:
        self._horizon, self._rows = config.horizon_tokens, rows_per_sequence
        self._cover = len(lod1_cover(config.geometry)[0]) if config.random_blocks else None
        self._fewest = 2 if config.lens_pair_baseline else 3
        self.function: Callable[..., PreferenceParts] = partial(
            preference_parts, rows_per_sequence=rows_per_sequence, config=config
        )

    def __call__(
        self,
        scores: Tensor,
        lods: Tensor,
        starts: Tensor,
        row_scores: Tensor,
        moments: Tensor | None = None,
    ) -> PreferenceResult:
        """See `preference_loss`; `moments` are `GainMoments.moments`."""
        self._check_shapes(scores, lods, starts, row_scores)
        inputs = (scores, lods, starts, row_scores)
        parts = self.function(*inputs) if moments is None else self.function(*inputs, moments)
        statistics = Statistics.from_flat(parts.statistics)
        return PreferenceResult(parts.numerator, parts.denominator, parts.gain_moments, statistics)

    def _check_shapes(
        self, scores: Tensor, lods: Tensor, starts: Tensor, row_scores: Tensor
    ) -> None:
        """Raise ValueError naming the shapes if they do not match."""
        rows = self._rows
        if rows < self._fewest:
            raise ValueError(
                f"rows_per_sequence = {rows} leaves no pair to learn from: use at least "
                f"{self._fewest}, baseline included"
            )
        count = len(lods)
        read = lods.shape if self._cover is None else (count // rows, self._cover)
        same = (
            lods.dim() == 2
            and lods.shape == starts.shape
            and scores.shape == read
            and row_scores.shape == lods.shape[:1]
        )
        if not same or count == 0 or count % rows or lods.shape[1] <= self._horizon:
            of_scores = "[R, W]" if self._cover is None else f"[R / {rows}, {self._cover}]"
            raise ValueError(
                f"scores {tuple(scores.shape)}, lods {tuple(lods.shape)}, "
                f"starts {tuple(starts.shape)}, row_scores {tuple(row_scores.shape)} must be "
                f"{of_scores}, [R, W] twice and [R], with R a multiple of rows_per_sequence = "
                f"{rows} and W above horizon_tokens = {self._horizon}"
            )


def preference_parts(
    scores: Tensor,
    lods: Tensor,
    starts: Tensor,
    row_scores: Tensor,
    moments: Tensor | None = None,
    *,
    rows_per_sequence: int,
    config: MCConfig,
) -> PreferenceParts:
    """Return `preference_loss` with its metrics, as a pure function of tensors."""
    geometry = config.geometry
    statistics = Statistics(device=scores.device)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    row_scores = (
        row_scores.detach()
        .to(torch.promote_types(row_scores.dtype, torch.float32))
        .unflatten(0, (-1, rows_per_sequence))
    )
    with torch.no_grad():
        record_scores(statistics, scores, config.horizon_tokens)
        record_variants(
            statistics, lods.unflatten(0, (-1, rows_per_sequence)), row_scores, geometry
        )

    # Rows that form pairs: all, or all but the baseline.
    paired = slice(0 if config.lens_pair_baseline else 1, None)
    of_row = [x.unflatten(0, (-1, rows_per_sequence))[:, paired] for x in (lods, starts)]
    if config.random_blocks:
        rows = _cover_rows(scores, of_row[0].shape[1], config)
        with torch.no_grad():
            decisions = decide_blocks(of_row[1], geometry)
    else:
        rows = Rows(scores.unflatten(0, (-1, rows_per_sequence))[:, paired], *of_row)
        with torch.no_grad():
            decisions = decide(rows.lods, rows.starts, geometry)
    with torch.no_grad():
        moves = _weigh(decisions, row_scores[:, paired], config, moments)
    # Weighted sum over moves.
    weights = moves.weights.to(scores.dtype)
    numerator = (
        weights * _terms(decisions, rows, moves.gain.sign().to(scores.dtype), config)
    ).sum()
    denominator = weights.sum()

    # Telemetry, over variants alone.
    with torch.no_grad():
        variants = slice(int(config.lens_pair_baseline), None)
        record_preference(
            statistics,
            Decisions(*(weight[:, variants, variants] for weight in decisions)),
            Rows(*(x[:, variants].detach() for x in rows)),
            moves.gain[:, variants, variants],
            moves.usable[:, variants, variants],
            geometry,
        )
        statistics.add_mean("mc/lens_loss", numerator, denominator)
        statistics.add_sum("mc/preference_pair_count", (weights > 0).sum())
    return PreferenceParts(numerator, denominator, moves.moments, statistics.flat())


def _cover_rows(scores_BM: Tensor, rows: int, config: MCConfig) -> Rows:
    """Return scores [B, n_1 + tail] of the LOD1 cover and its plan, repeated for `rows` rows."""
    lods, starts = lod1_cover(config.geometry, scores_BM.device)
    shape = (len(scores_BM), rows, scores_BM.size(1))
    return Rows(scores_BM[:, None].expand(shape), lods.expand(shape), starts.expand(shape))


class _Moves(NamedTuple):
    gain: Tensor
    """g, [B, a, b]."""
    usable: Tensor
    """True for moves with decisions between rows of finite score, [B, a, b]."""
    weights: Tensor
    """v, float64 [B, a, b]; 0 for moves that are not usable or not selected."""
    moments: Tensor
    """See `PreferenceParts.gain_moments`."""


def _weigh(
    decisions: Decisions, row_scores: Tensor, config: MCConfig, running: Tensor | None
) -> _Moves:
    """Return gain and loss weight of every move between the rows of `row_scores` [B, G].

    `running` are the moments of earlier gains; None: those of this batch are used.
    """
    finite = row_scores.isfinite()
    gain = gains(torch.where(finite, row_scores, 0.0))
    decided = (decisions.expand + decisions.collapse).sum(-1) > 0
    usable = decided & finite[:, :, None] & finite[:, None, :]
    moments = torch.stack(
        (torch.where(usable, gain, 0.0).double().square().sum(), usable.sum().double())
    )
    std = gain_std(*(moments if running is None else running).unbind())
    first_variant = int(config.lens_pair_baseline)
    # Select pairs: those of the best variant first.
    best = torch.where(finite, row_scores, torch.inf)[:, first_variant:].argmin(1) + first_variant
    kept = pairs_kept(row_scores.shape[1], config.max_lens_pairs, config.lens_hard_negative_ratio)
    selected = select_pairs(gain, usable, best, kept)
    return _Moves(gain, usable, torch.where(selected, move_weights(gain, std), 0.0), moments)


def _terms(decisions: Decisions, rows: Rows, sign: Tensor, config: MCConfig) -> Tensor:
    """Return the loss of every move, including regularisers, [B, a, b]; `sign` [B, a, b] is that of
    its gain.
    """
    geometry = config.geometry
    m = margins(decisions, rows, geometry)
    terms = (
        pair_terms(m, sign, config)
        if config.lens_objective == "pair"
        else entry_terms(decisions, rows.scores, sign, config)
    )
    if config.lens_rank_weight:
        terms = terms + config.lens_rank_weight * rank_terms(m.joint, sign, config)
    if config.lens_budget_weight:
        terms = terms + config.lens_budget_weight * budget_imbalance(rows, geometry)
    return terms
