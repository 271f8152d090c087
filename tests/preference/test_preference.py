"""The preference loss against the reference, and what changes it or does not."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.preference import GainMoments, PreferenceLoss, preference_loss
from mc_ds.preference.objective import (
    Margins,
    Rows,
    budget_imbalance,
    centre_per_lod,
    pair_terms,
    weighted_margin,
)
from mc_ds.preference.telemetry import _margin_scale
from tests.support.preferences import Batch, planted_batch, small_config

LN2 = math.log(2)


OPTIONS = st.fixed_dictionaries(
    {
        "lens_objective": st.sampled_from(["pair", "pair", "entry"]),
        "lens_split_margins": st.booleans(),
        "lens_temperature": st.sampled_from([0.5, 1.3]),
        "lens_collapse_weight": st.sampled_from([1.0, 0.4, 0.0]),
        "lens_rank_weight": st.sampled_from([0.0, 0.7]),
        "lens_margin": st.sampled_from([0.1, 1.5]),
        "lens_budget_weight": st.sampled_from([0.0, 2.0]),
        "lens_pair_baseline": st.booleans(),
        "max_lens_pairs": st.sampled_from([1, 2, 4, 32]),
        "lens_hard_negative_ratio": st.sampled_from([1.0, 0.6]),
        "max_lod": st.sampled_from([1, 2]),
        "train_wc_length": st.sampled_from(
            [22, 18]
        ),  # at 18 one level leaves three open tokens: few, but never pooled with gists
    }
)


@settings(max_examples=40, deadline=None)
@given(OPTIONS, st.integers(0, 2**32), st.sampled_from([None, 0.2]))
def test_loss_and_gradient_equal_the_reference(
    options: dict[str, Any], seed: int, std: float | None
) -> None:
    batch = Batch(small_config(**options), sequences=2, seed=seed)
    state = None
    if std is not None:
        state = GainMoments(beta=0.9)
        state.update(torch.tensor(10 * std**2), torch.tensor(10.0))
    scores, twin = batch.scores.clone().requires_grad_(), batch.scores.clone().requires_grad_()
    result, expected = batch.loss(scores, state=state), batch.reference(twin, std)
    torch.testing.assert_close(result.loss, expected.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        result.denominator,
        torch.tensor(expected.denominator, dtype=torch.float64),
        rtol=1e-5,
        atol=1e-7,
    )
    result.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(scores.grad, twin.grad, rtol=1e-5, atol=1e-6)
    moves = [move for moves in expected.moves for move in moves]
    squares = sum(move.gain**2 for move in moves)
    torch.testing.assert_close(
        result.gain_moments,
        torch.tensor([squares, len(moves)], dtype=torch.float64),
        rtol=1e-5,
        atol=1e-7,
    )
    assert result.statistics.record()["mc/preference_pair_count"] == sum(
        move.v > 0 for move in moves
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(-3, 3), st.booleans())
def test_a_constant_added_to_all_scores_changes_no_preference(
    seed: int, constant: float, split: bool
) -> None:
    batch = Batch(small_config(lens_split_margins=split), sequences=2, seed=seed)
    before, after = batch.loss(), batch.loss(batch.scores + constant)
    torch.testing.assert_close(before.loss, after.loss, atol=1e-5, rtol=1e-5)
    for name in ("mc/preference_corr_mean", "mc/preference_agreement"):
        torch.testing.assert_close(before.metrics[name], after.metrics[name], atol=1e-4, rtol=1e-4)


def test_the_horizon_and_the_tail_have_no_gradient() -> None:
    batch = Batch(small_config(), sequences=2, seed=1)
    scores = batch.scores.clone().requires_grad_()
    batch.loss(scores).loss.backward()
    in_tail = batch.starts >= batch.config.geometry.head_len
    assert scores.grad is not None
    assert not scores.grad[in_tail].any()
    assert not scores.grad[::4].any(), "the baseline takes no part by default"
    assert scores.grad[~in_tail].any()


def test_liking_what_lowered_the_loss_is_rewarded() -> None:
    """The sign: gists over helpful blocks high and open tokens of useless blocks low must lose
    less than the opposite.
    """
    batch, scores = planted_batch(
        small_config(max_lod=1, train_wc_length=24, num_random_variants=4), sequences=4, noise=0.0
    )
    right, wrong, silent = (float(batch.loss(factor * scores).loss) for factor in (1.0, -1.0, 0.0))
    assert silent == pytest.approx(LN2, abs=1e-6)
    assert right < LN2 < wrong
    record = batch.loss(scores).statistics.record()
    assert record["mc/preference_corr_mean"] < -0.9
    assert record["mc/preference_agreement"] > 0.9
    # From zero, descent raises the gists of blocks whose detail helps and lowers the others.
    start = torch.zeros_like(scores, requires_grad=True)
    batch.loss(start).loss.backward()
    gists = (batch.lods > 0) & (start.grad != 0)
    assert torch.corrcoef(torch.stack((-start.grad[gists], scores[gists])))[0, 1] > 0.5


@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
def test_a_move_loses_the_weighted_mean_over_the_sides_that_it_has(sign: float) -> None:
    """In full float64; of moves without a side, with one, the other, and both."""
    config = small_config(lens_collapse_weight=0.4, lens_temperature=1.3)
    joint, expand, collapse = (
        torch.tensor([0.25, -0.5, 0.75]).double().expand(1, 2, 2, 3).unbind(-1)
    )
    has_expand, has_collapse = torch.tensor([[[0, 2, 0, 3]], [[0, 0, 1, 1]]]).view(2, 1, 2, 2)
    m = Margins(joint, expand, collapse, has_expand.double(), has_collapse.double())
    found = pair_terms(m, torch.full((1, 2, 2), sign).double(), config).flatten().tolist()
    losses = [math.log1p(math.exp(-sign * x / 1.3)) for x in (0.25, -0.5, 0.75)]
    for loss, weights in zip(found, [(1, 0, 0), (1, 1, 0), (1, 0, 0.4), (1, 1, 0.4)], strict=True):
        expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("lods", "pools"),
    [
        ([0, 0, 0, 1], [[0, 1, 2], [3]]),
        ([0, 1, 1, 1], [[0], [1, 2, 3]]),  # one open token: never pooled with gists
        ([0, 0, 1, 1, 1, 2], [[0, 1], [2, 3, 4, 5], [2, 3, 4, 5]]),  # few of each: all gists
        ([0, 1, 1, 1, 1, 2], [[0], [1, 2, 3, 4], [1, 2, 3, 4, 5]]),  # four are enough
        ([1, 1, 1, 1, 2, 2, 2, 2], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_scores_are_centred_by_the_mean_of_their_level_or_of_all_gists_where_they_are_few(
    lods: list[int], pools: list[list[int]]
) -> None:
    """`pools` are the entries over which the mean of each level that is there is taken. A tail of
    six tokens follows, whose scores count in no mean.
    """
    config = small_config(seq_len=78, train_wc_length=40)
    widths = torch.tensor([3**lod for lod in lods])
    starts = torch.cat([widths.cumsum(0) - widths, torch.arange(72, 78)])[None, None]
    plan = torch.tensor([[lods + [0] * 6]])
    scores = torch.randn(plan.shape, generator=torch.Generator().manual_seed(1)).double()
    scores[..., -6:] = 50.0
    found = centre_per_lod(Rows(scores, plan, starts), config.geometry)
    pool_of = dict(zip(sorted(set(lods)), pools, strict=True))
    for entry, lod in enumerate(lods):
        expected = scores[0, 0, entry] - scores[0, 0, pool_of[lod]].mean()
        assert found[0, 0, entry].item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("length", [6, 7, 9, 36])
def test_the_budget_compares_the_mass_of_scores_before_the_tail(length: int) -> None:
    """In windows of the last tokens, of which 0, 1, 3 or all 30 of the head are in sight."""
    config = small_config()
    starts = torch.arange(36 - length, 36)[None, None]
    scores = torch.randn(starts.shape, generator=torch.Generator().manual_seed(0))
    head = scores[0, 0, : length - 6].tolist()
    rows = Rows(scores, torch.zeros_like(starts), starts)
    found = budget_imbalance(rows, config.geometry)
    assert found.shape == (1, 1, 1)
    assert found.item() == pytest.approx((sum(head) / max(1, len(head))) ** 2, rel=1e-5)


def test_a_margin_is_the_sum_of_weighted_scores_over_the_root_of_their_mass() -> None:
    weights = torch.tensor([[[[0.25, 0.0], [3.0, 1.0], [0.0, 0.0]]]])
    margin = weighted_margin(weights, torch.tensor([[[2.0, -4.0]]]), weights.sum(-1))
    assert margin.flatten().tolist() == [1.0, 1.0, 0.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_no_margin_is_above_its_scale_and_aligned_scores_reach_it(seed: int) -> None:
    """The largest margin of a sequence is that of its heaviest move, if every score has its
    largest size and the sign of its decision.
    """
    generator = torch.Generator().manual_seed(seed)
    signed = torch.randn(3, 2, 2, 5, generator=generator, dtype=torch.float64)
    mass = signed.abs().sum(-1)
    scores = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    scale = _margin_scale(scores, mass)[:, None, None]
    assert (weighted_margin(signed, scores, mass).abs() <= scale * (1 + 1e-12)).all()
    size = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    heaviest = mass.flatten(1).argmax(1)
    for sequence, move in enumerate(heaviest.tolist()):
        aligned = size[sequence] * signed[sequence].flatten(0, 1)[move].sign().expand(1, 2, -1)
        one = slice(sequence, sequence + 1)
        margin = weighted_margin(signed[one], aligned, mass[one]).amax()
        torch.testing.assert_close(margin, _margin_scale(aligned, mass[one])[0])
    torch.testing.assert_close(
        _margin_scale(size[:, None, None].expand(3, 2, 5), mass),
        size * mass.amax((1, 2)).sqrt(),
        msg="each sequence by itself",
    )


def test_the_loss_has_the_type_of_the_scores_whatever_that_of_the_row_scores() -> None:
    batch = Batch(small_config(), sequences=2, seed=8)
    for of_scores in (torch.float32, torch.float64):
        for of_rows in (torch.float32, torch.float64):
            row_scores = batch.row_scores.to(of_rows)
            result = batch.loss(batch.scores.to(of_scores), row_scores=row_scores)
            assert {result.numerator.dtype, result.loss.dtype} == {of_scores}


OBJECTIVES = pytest.mark.parametrize(
    "options", [{}, dict(lens_objective="entry", lens_budget_weight=1.0, lens_rank_weight=1.0)]
)


@OBJECTIVES
def test_runs_without_the_host(options: dict[str, Any]) -> None:
    """Tensors without data fail where anything is read on the host."""
    batch = Batch(small_config(**options), sequences=2, seed=9)
    state = GainMoments(beta=0.9, device="meta")
    scores = torch.empty(batch.scores.shape, device="meta", requires_grad=True)
    plan = (x.to("meta") for x in (batch.lods, batch.starts, batch.row_scores))
    result = preference_loss(scores, *plan, rows_per_sequence=4, config=batch.config, state=state)
    result.loss.backward()
    result.statistics.merge(result.statistics).pack()
    state.update(*result.gain_moments)
    assert state.std().is_meta
    assert result.statistics.pack().table.is_meta


@OBJECTIVES
def test_is_one_graph(options: dict[str, Any]) -> None:
    """`fullgraph` fails where the graph breaks."""
    batch = Batch(small_config(**options), sequences=2, seed=9)
    compiled = torch.compile(preference_loss, backend="eager", fullgraph=True)
    arguments = dict(rows_per_sequence=4, config=batch.config, state=GainMoments(beta=0.9))
    one_graph = compiled(batch.scores, batch.lods, batch.starts, batch.row_scores, **arguments)
    assert torch.equal(one_graph.loss, batch.loss(state=GainMoments(beta=0.9)).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scores=torch.zeros(8, 21)), r"scores \(8, 21\), lods \(8, 22\)"),
        (
            dict(row_scores=torch.zeros(2, 4)),
            r"row_scores \(2, 4\) must be \[R, W\], \[R, W\] twice and \[R\]",
        ),
        (dict(rows_per_sequence=5), "multiple of rows_per_sequence = 5"),
        (dict(rows_per_sequence=2), r"rows_per_sequence = 2 leaves no pair .*: use at least 3"),
        (
            dict(rows_per_sequence=1, config=small_config(lens_pair_baseline=True)),
            r"rows_per_sequence = 1 leaves no pair .*: use at least 2",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    batch = Batch(small_config(), sequences=2, seed=10)
    with pytest.raises(ValueError, match=message):
        batch.loss(**change)


def test_no_rows_or_nothing_before_the_horizon_are_refused() -> None:
    batch = Batch(small_config(), sequences=2, seed=10)
    for cut in (lambda x: x[:0], lambda x: x[:, :3]):
        scores, lods, starts = map(cut, (batch.scores, batch.lods, batch.starts))
        row_scores = batch.row_scores[: len(scores)]
        with pytest.raises(ValueError, match=r"must be \[R, W\], \[R, W\] twice"):
            preference_loss(
                scores, lods, starts, row_scores, rows_per_sequence=4, config=batch.config
            )
    beyond = [x[:, :4] for x in (batch.scores, batch.lods, batch.starts)]
    PreferenceLoss(batch.config, 4)._check_shapes(*beyond, batch.row_scores)
