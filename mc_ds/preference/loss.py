"""`preference_loss`: what random variants of one sequence teach LensNet, as one ratio of sums.

decisions of every move -> margins -> loss terms, weighted by the size of the gain. Numerator and
denominator add up over micro-steps and ranks: backpropagate each numerator, divide the summed
gradient by the summed denominator once.

Legend: B sequences, G rows of a sequence, R = B*G rows, W entries, a -> b a move between rows.
Source: docs/lensnet-pairwise-training.md, "Preference learning".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.metrics import FlatStatistics, Statistics
from mc_ds.preference.decisions import Decisions, decide
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
    """Loss and telemetry of one micro-batch as tensors. Only `numerator` carries a gradient."""

    numerator: Tensor
    """Sum over moves of v times the move's loss, 0-d."""
    denominator: Tensor
    """Sum over moves of v, 0-d."""
    gain_moments: Tensor
    """float64 [2]: sum of g^2 and number of the moves with decisions, selected or not: what
    `GainMoments.update` takes.
    """
    statistics: FlatStatistics
    """The metrics in parts that reduce exactly over micro-steps and ranks."""


@dataclass(frozen=True)
class PreferenceResult:
    """Loss and telemetry of one micro-batch. Only `loss` and `numerator` carry gradients."""

    numerator: Tensor
    """See `PreferenceParts`."""
    denominator: Tensor
    """See `PreferenceParts`."""
    gain_moments: Tensor
    """See `PreferenceParts`."""
    statistics: Statistics
    """The metrics in parts that reduce exactly over micro-steps and ranks."""

    @property
    def loss(self) -> Tensor:
        """numerator / denominator, 0-d; 0 where no move has weight."""
        return self.numerator / torch.where(self.denominator > 0, self.denominator, 1.0)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Finished metrics of this micro-batch by full name, float64 0-d; 0 where nothing was
        counted.
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
    """Compute the signed preference loss over all pairs of variants, in float32 or float64, without
    waiting for the device.

    `scores` [R, W] (zero in the horizon, which LensNet does not see), the plan `lods` and `starts`
    [R, W], `row_scores` [R] in nats; rows of a sequence are adjacent, the baseline first. `state`
    holds the running moments of the gains from before the step; None uses those of this batch.

    A row whose score is not finite is left out and counted by `mc/nonfinite_rows`; a policy score
    that is not finite makes the loss so. Raises ValueError for shapes that do not fit.
    """
    return PreferenceLoss(config, rows_per_sequence)(
        scores, lods, starts, row_scores, state.moments if state is not None else None
    )


class PreferenceLoss:
    """`preference_loss` for one number of rows per sequence.

    `function` may be replaced by an equivalent, such as its CUDA graph.
    """

    def __init__(self, config: MCConfig, rows_per_sequence: int) -> None:
        self._horizon, self._rows = config.horizon_tokens, rows_per_sequence
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
        """See `preference_loss`; `moments` are those of `GainMoments`."""
        self._check_shapes(scores, lods, starts, row_scores)
        inputs = (scores, lods, starts, row_scores)
        parts = self.function(*inputs) if moments is None else self.function(*inputs, moments)
        statistics = Statistics.from_flat(parts.statistics)
        return PreferenceResult(parts.numerator, parts.denominator, parts.gain_moments, statistics)

    def _check_shapes(
        self, scores: Tensor, lods: Tensor, starts: Tensor, row_scores: Tensor
    ) -> None:
        """Raise ValueError naming the shapes where they do not fit together."""
        rows = self._rows
        if rows < self._fewest:
            raise ValueError(
                f"rows_per_sequence = {rows} has no pairs to learn from: "
                f"at least {self._fewest}, baseline included"
            )
        same = (
            scores.dim() == 2
            and scores.shape == lods.shape == starts.shape
            and row_scores.shape == scores.shape[:1]
        )
        if (
            not same
            or scores.shape[0] == 0
            or scores.shape[0] % rows
            or scores.shape[1] <= self._horizon
        ):
            raise ValueError(
                f"scores {tuple(scores.shape)}, lods {tuple(lods.shape)}, "
                f"starts {tuple(starts.shape)}, row_scores {tuple(row_scores.shape)} must be "
                f"[R, W] three times and [R], with R a multiple of rows_per_sequence = {rows} "
                f"and W above horizon_tokens = {self._horizon}"
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
    """Compute `preference_loss`, loss and metrics, as one function of tensors."""
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

    paired = slice(0 if config.lens_pair_baseline else 1, None)
    rows = Rows(
        *(x.unflatten(0, (-1, rows_per_sequence))[:, paired] for x in (scores, lods, starts))
    )
    with torch.no_grad():
        decisions = decide(rows.lods, rows.starts, geometry)
        moves = _weigh(decisions, row_scores[:, paired], config, moments)
    weights = moves.weights.to(scores.dtype)
    numerator = (
        weights * _terms(decisions, rows, moves.gain.sign().to(scores.dtype), config)
    ).sum()
    denominator = weights.sum()

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


class _Moves(NamedTuple):
    gain: Tensor
    """g, [B, a, b]."""
    usable: Tensor
    """Moves with decisions between rows of finite score, [B, a, b]."""
    weights: Tensor
    """v, float64 [B, a, b]; 0 where the move is not usable or its pair not selected."""
    moments: Tensor
    """float64 [2], see `PreferenceResult.gain_moments`."""


def _weigh(
    decisions: Decisions, row_scores: Tensor, config: MCConfig, running: Tensor | None
) -> _Moves:
    """Compute the weight in the loss of every move between the rows of `row_scores` [B, G]."""
    finite = row_scores.isfinite()
    gain = gains(torch.where(finite, row_scores, 0.0))
    decided = (decisions.expand + decisions.collapse).sum(-1) > 0
    usable = decided & finite[:, :, None] & finite[:, None, :]
    moments = torch.stack(
        (torch.where(usable, gain, 0.0).double().square().sum(), usable.sum().double())
    )
    std = gain_std(*(moments if running is None else running).unbind())
    first_variant = int(config.lens_pair_baseline)
    best = torch.where(finite, row_scores, torch.inf)[:, first_variant:].argmin(1) + first_variant
    kept = pairs_kept(row_scores.shape[1], config.max_lens_pairs, config.lens_hard_negative_ratio)
    selected = select_pairs(gain, usable, best, kept)
    return _Moves(gain, usable, torch.where(selected, move_weights(gain, std), 0.0), moments)


def _terms(decisions: Decisions, rows: Rows, sign: Tensor, config: MCConfig) -> Tensor:
    """Return the loss of every move, regularisers included, [B, a, b]."""
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
