"""Metrics of the preference loss, and sequences that it leaves out."""

import math

import pytest
import torch

from mc_ds.preference import GainMoments, preference_loss
from tests.support.preferences import Batch, small_config
from tests.support.reference_preference import (
    correlation,
)


def test_metrics_equal_the_reference() -> None:
    batch = Batch(small_config(num_random_variants=4), sequences=3, seed=5)
    batch.row_scores[2] = batch.row_scores[1]
    result = batch.loss()
    found, expected = result.statistics.record(), batch.reference(batch.scores)
    assert {name: float(value) for name, value in result.metrics.items()} == found
    correlations = [correlation(moves) for moves in expected.moves]
    assert found["mc/preference_corr_mean"] == pytest.approx(sum(correlations) / 3, abs=1e-6)
    assert found["mc/preference_corr_max"] == pytest.approx(max(correlations), abs=1e-6)
    assert found["mc/preference_corr_min"] == pytest.approx(min(correlations), abs=1e-6)
    moves = [move for moves in expected.moves for move in moves if move.gain]
    assert len(moves) == 3 * 12 - 2, "the tied pair says nothing"
    agreed = [(move.margin > 0) == (move.gain > 0) for move in moves]
    assert found["mc/preference_agreement"] == pytest.approx(sum(map(float, agreed)) / len(agreed))

    lods, scores = (
        batch.lods.unflatten(0, (3, 5))[:, 1:],
        batch.row_scores.double().unflatten(0, (3, 5)),
    )
    delta = scores[:, 1:] - scores[:, :1]
    assert found["mc/adv_delta_mean"] == pytest.approx(float(delta.mean()))
    assert found["mc/adv_delta_std"] == pytest.approx(float(delta.std(correction=0)))
    assert found["mc/adv_delta_p95"] == pytest.approx(float(delta.flatten().quantile(0.95)))
    for level in range(3):
        count = (lods == level).sum(-1).double()
        assert found[f"mc/lod_count/{level}"] == pytest.approx(float(count.mean()))
        share = count * 3**level / 36
        if level:
            assert found[f"mc/lod_delta/{level}"] == pytest.approx(
                float((share * delta).sum() / share.sum())
            )
    assert found["mc/lod2_share"] == pytest.approx(float((lods == 2).sum() * 8 / (12 * (36 - 22))))
    assert (found["mc/compression_ratio"], found["mc/wc_length"], found["mc/variants_total"]) == (
        pytest.approx(36 / 22),
        22,
        12,
    )
    visible = batch.scores[:, :-3]
    assert found["mc/policy_score_abs_mean"] == pytest.approx(float(visible.abs().mean()))
    assert found["mc/policy_score_std_mean"] == pytest.approx(
        float(visible.std(-1, correction=0).mean())
    )
    assert found["mc/lens_loss"] == pytest.approx(float(result.loss))
    assert found["mc/nonfinite_rows"] == 0


def test_two_ranks_add_up_to_one_batch() -> None:
    whole = Batch(small_config(lens_rank_weight=0.5, lens_budget_weight=1.0), sequences=4, seed=2)
    state = GainMoments(beta=0.5)
    state.update(torch.tensor(0.4), torch.tensor(8.0))
    scores = whole.scores.clone().requires_grad_()
    one = whole.loss(scores, state=state)
    one.loss.backward()
    halves, gradients = [], []
    for half in (slice(0, 8), slice(8, 16)):
        part = whole.scores[half].clone().requires_grad_()
        plan = whole.lods[half], whole.starts[half], whole.row_scores[half]
        halves.append(
            preference_loss(part, *plan, rows_per_sequence=4, config=whole.config, state=state)
        )
        halves[-1].numerator.backward()
        gradients.append(part.grad)
    denominator = halves[0].denominator + halves[1].denominator
    torch.testing.assert_close((halves[0].numerator + halves[1].numerator) / denominator, one.loss)
    torch.testing.assert_close(torch.cat(gradients) / denominator, scores.grad)
    torch.testing.assert_close(halves[0].gain_moments + halves[1].gain_moments, one.gain_moments)
    merged, expected = (
        halves[0].statistics.merge(halves[1].statistics).record(),
        one.statistics.record(),
    )
    control = "mc/preference_corr_lod_only"  # its mean scores are those of one micro-batch
    assert merged.keys() == expected.keys()
    assert {k: v for k, v in merged.items() if k != control} == pytest.approx(
        {k: v for k, v in expected.items() if k != control}
    )


def test_nothing_to_learn_is_a_loss_of_zero_and_no_metric() -> None:
    batch = Batch(small_config(), sequences=1, seed=4)
    batch.lods[1:], batch.starts[1:] = batch.lods[1].clone(), batch.starts[1].clone()
    scores = batch.scores.clone().requires_grad_()
    result = batch.loss(scores)
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert not scores.grad.any()
    record = result.statistics.record()
    assert "mc/lens_loss" not in record
    assert "mc/preference_corr_mean" not in record
    assert record["mc/preference_pair_count"] == 0
    assert all(value.isfinite() for value in result.metrics.values())


@pytest.mark.parametrize("sign", [1, -1])
def test_sequences_without_variance_are_left_out_by_count(sign: int) -> None:
    batch = Batch(small_config(), sequences=2, seed=6)
    batch.scores *= sign
    alone = batch.reference(batch.scores).moves[1]
    batch.scores[:4] = 0.7  # rounding of equal scores is no variance
    record = batch.loss().statistics.record()
    for statistic in ("mean", "max", "min"):
        assert record[f"mc/preference_corr_{statistic}"] == pytest.approx(
            correlation(alone), abs=1e-6
        )
    batch.row_scores[4:] = 2.0
    assert "mc/preference_corr_max" not in batch.loss().statistics.record()


def test_scores_of_zero_agree_half_and_correlate_with_nothing() -> None:
    """As those of a LensNet that has not begun to learn."""
    batch = Batch(small_config(), sequences=2, seed=6)
    record = batch.loss(torch.zeros_like(batch.scores)).statistics.record()
    assert record["mc/preference_agreement"] == 0.5
    assert not {name for name in record if "corr" in name}
    assert all(math.isfinite(value) for value in record.values())


@pytest.mark.parametrize("factors", [(1e-9, 1e-9), (1e9, 1e9), (1e9, 1.0), (1.0, 1e-9)])
def test_the_scale_of_a_sequences_scores_changes_no_correlation(
    factors: tuple[float, float],
) -> None:
    """Scores that differ by much less than others are large still vary."""
    batch = Batch(small_config(), sequences=2, seed=6)
    expected = batch.loss().statistics.record()
    scores = batch.scores * torch.tensor(factors, dtype=torch.float64).repeat_interleave(4)[:, None]
    found = batch.loss(scores).statistics.record()
    for name in ("mean", "max", "min"):
        key = f"mc/preference_corr_{name}"
        assert found[key] == pytest.approx(expected[key], abs=1e-6), name


def test_rows_of_non_finite_score_take_part_in_nothing_and_are_counted() -> None:
    batch = Batch(small_config(), sequences=2, seed=7)
    batch.row_scores[2] = math.nan
    batch.row_scores[7] = math.inf
    result, expected = batch.loss(), batch.reference(batch.scores)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-6, atol=1e-6)
    record = result.statistics.record()
    scores = batch.row_scores.unflatten(0, (2, 4)).double()
    delta = (scores[:, 1:] - scores[:, :1]).flatten()
    finite, gists = (
        delta.isfinite(),
        (batch.lods == 1).sum(-1).unflatten(0, (2, 4))[:, 1:].flatten().double(),
    )
    assert record["mc/adv_delta_mean"] == pytest.approx(float(delta[finite].mean()))
    assert record["mc/lod_delta/1"] == pytest.approx(
        float((gists * delta)[finite].sum() / gists[finite].sum())
    )
    assert record["mc/nonfinite_rows"] == 2
    assert record["mc/preference_pair_count"] == 4
    assert all(math.isfinite(value) for value in record.values())


def test_a_row_of_non_finite_score_is_no_best_variant() -> None:
    """Two of the three pairs that are left are kept: those of the best finite row, though
    another pair has the second largest gain.
    """
    batch = Batch(small_config(num_random_variants=4, max_lens_pairs=2), sequences=1, seed=7)
    for value in (math.nan, math.inf, -math.inf):
        batch.row_scores[1:] = torch.tensor([value, 3.0, 1.0, 1.5])
        result, expected = batch.loss(), batch.reference(batch.scores)
        kept = {(move.a, move.b) for move in expected.moves[0] if move.v > 0}
        assert kept == {(2, 3), (3, 2), (3, 4), (4, 3)}
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-6, atol=1e-6)


def test_half_precision_scores_are_judged_in_float32() -> None:
    batch = Batch(small_config(), sequences=2, seed=8)
    half = batch.scores.bfloat16()
    result = batch.loss(half)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(
        result.loss.double(), batch.loss(half.double()).loss, rtol=1e-5, atol=1e-6
    )
    of_rows = (
        batch.row_scores * torch.tensor([1, 0.011, 1, 3.1] * 2)
    ).bfloat16()  # not of one size
    assert torch.equal(
        batch.loss(row_scores=of_rows).loss, batch.loss(row_scores=of_rows.float()).loss
    )


def test_telemetry_is_of_variants_alone_also_where_the_baseline_is_paired() -> None:
    for seed in range(3):
        records = [
            Batch(small_config(lens_pair_baseline=paired), sequences=2, seed=seed)
            .loss()
            .statistics.record()
            for paired in (False, True)
        ]
        assert records[0]["mc/lens_loss"] != records[1]["mc/lens_loss"]
        of_loss = ("mc/lens_loss", "mc/preference_pair_count")
        alone, paired = ({k: v for k, v in x.items() if k not in of_loss} for x in records)
        assert alone == paired
