"""The preference loss against the reference, and the facts that keep LensNet from learning
something else than focus.
"""

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.preference import GainMoments, PreferenceLoss, PreferenceResult, preference_loss
from mc_ds.preference import loss as loss_module
from mc_ds.preference.objective import (
    Margins,
    Rows,
    budget_imbalance,
    centre_per_lod,
    pair_terms,
    weighted_margin,
)
from mc_ds.preference.pairs import gains, select_pairs
from mc_ds.preference.telemetry import _margin_scale
from mc_ds.variants import TrainingWCVariationAllocator
from tests.support.reference_preference import (
    as_tensors,
    baseline_row,
    correlation,
    preference,
    random_rows,
)

LN2 = math.log(2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: threads that wait for each other on busy cores would make
    them ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_config(**options: Any) -> MCConfig:
    """Two levels at K = 3: 36 tokens in 22 entries, a head of 30."""
    shape = dict(
        seq_len=36,
        block_size=3,
        max_lod=2,
        train_wc_length=22,
        recent_tokens=6,
        horizon_tokens=3,
        num_random_variants=3,
    )
    return MCConfig(**{**shape, **options})


class Batch:
    """Random plans and scores, as Python rows for the reference and as tensors."""

    def __init__(self, config: MCConfig, sequences: int, seed: int) -> None:
        rng = random.Random(seed)
        self.config, self.rows_per_sequence = config, config.rows_per_sequence
        self.sequences = [
            [baseline_row(config), *random_rows(rng, config, config.num_random_variants)]
            for _ in range(sequences)
        ]
        self.lods, self.starts = as_tensors([row for rows in self.sequences for row in rows])
        generator = torch.Generator().manual_seed(seed)
        self.scores = torch.rand(self.lods.shape, generator=generator, dtype=torch.float64) * 2 - 1
        self.row_scores = 2.5 + 0.3 * torch.randn(len(self.lods), generator=generator)

    def loss(self, scores: Tensor | None = None, **options: Any) -> PreferenceResult:
        arguments = (
            dict(
                row_scores=self.row_scores,
                rows_per_sequence=self.rows_per_sequence,
                config=self.config,
            )
            | options
        )
        return preference_loss(
            self.scores if scores is None else scores, self.lods, self.starts, **arguments
        )

    def reference(self, scores: Tensor, std: float | None = None) -> Any:
        by_sequence = self.row_scores.double().unflatten(0, (-1, self.rows_per_sequence)).tolist()
        return preference(
            self.sequences,
            scores.unflatten(0, (-1, self.rows_per_sequence)),
            by_sequence,
            self.config,
            std,
        )


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


@pytest.mark.parametrize(
    ("variants", "sequences", "seed"), [(4, 3, 5), (4, 3, 6), (4, 3, 7), (3, 2, 1), (3, 2, 3)]
)
def test_the_control_is_the_correlation_of_mean_scores_per_lod(
    variants: int, sequences: int, seed: int
) -> None:
    """The mean is that of all variants of the batch outside the tail; counts of levels differ
    between variants here. In the small batches a single gist is of LOD2.
    """
    batch = Batch(small_config(num_random_variants=variants), sequences, seed)
    of_lod: dict[int, list[float]] = {0: [], 1: [], 2: []}
    rows = [row for sequence in batch.sequences for row in sequence]
    for number, row in enumerate(rows):
        for i, (lod, start) in enumerate(row):
            if number % (variants + 1) and start < batch.config.geometry.head_len:
                of_lod[lod].append(float(batch.scores[number, i]))
    assert (len(of_lod[2]) == 1) == (variants == 3)
    mean = {lod: sum(scores) / len(scores) for lod, scores in of_lod.items()}
    assert max(mean.values()) - min(mean.values()) > 0.01
    replaced = torch.tensor([[mean[lod] for lod, _ in row] for row in rows], dtype=torch.float64)
    found = [
        value for value in map(correlation, batch.reference(replaced).moves) if value is not None
    ]
    expected = sum(found) / len(found)
    assert abs(expected) > 0.05, "or its sign would not show"
    assert batch.loss().statistics.record()["mc/preference_corr_lod_only"] == pytest.approx(
        expected, abs=1e-6
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


def planted_batch(
    config: MCConfig, sequences: int, noise: float, seed: int = 0
) -> tuple[Batch, Tensor]:
    """Row scores fall with the summed value of the blocks that lie open, plus noise (in units of
    their spread); scores know the values.
    """
    batch = Batch(config, sequences, seed)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(
        sequences, config.seq_len // config.block_size + 1, generator=generator, dtype=torch.float64
    )
    values = values.repeat_interleave(config.rows_per_sequence, 0)
    scores = values.gather(1, batch.starts // config.block_size)
    open_here = (batch.lods == 0) & (batch.starts < config.geometry.head_len)
    signal = -(scores * open_here).sum(1) / config.block_size
    signal = signal / signal.unflatten(0, (sequences, -1))[:, 1:].std(1).square().mean().sqrt()
    batch.row_scores = signal + noise * torch.randn(
        signal.shape, generator=generator, dtype=torch.float64
    )
    return batch, 0.3 * scores


def test_a_perfect_scorer_correlates_as_the_noise_permits() -> None:
    config = small_config(
        seq_len=64, block_size=2, max_lod=1, train_wc_length=50, num_random_variants=5
    )
    for noise, expected in ((0.0, -0.99), (0.5, -0.87), (1.0, -0.67)):
        batch, scores = planted_batch(config, sequences=60, noise=noise)
        record = batch.loss(scores).statistics.record()
        assert record["mc/preference_corr_mean"] == pytest.approx(expected, abs=0.06), noise
        assert abs(record["mc/preference_corr_lod_only"]) < 1e-3


def allocator_batch(
    max_lod: int, sequences: int, shared: bool = True, worth: float = 0.0
) -> tuple[Rows, Tensor, MCConfig]:
    """Plans of the training allocator and row scores that know where detail lies; `worth` is the
    mean worth of an open token.

    LOD histograms are equal within a sequence; unless `shared`, each variant is drawn as if of a
    sequence of its own.
    """
    length, variants = (148, 4) if max_lod == 1 else (211, 4)
    seq_len = 256 if max_lod == 1 else 512
    config = small_config(
        seq_len=seq_len,
        block_size=8 if max_lod == 2 else 4,
        max_lod=max_lod,
        train_wc_length=length,
        num_random_variants=variants,
    )
    allocator = TrainingWCVariationAllocator(
        config.geometry,
        length,
        lod2_probability=0.5,
    )
    drawn = variants if shared else 1
    plans = [
        allocator.sample(drawn, (3, index)) for index in range(sequences * (variants // drawn))
    ]
    lods, starts = (
        torch.from_numpy(np.concatenate(part)).unflatten(0, (sequences, variants))
        for part in zip(*plans, strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sequences, 1, seq_len, generator=generator).expand(-1, variants, -1)
    row_scores = ((values.gather(2, starts) - worth) * (lods == 0)).mean(2)
    return Rows(torch.zeros(lods.shape), lods, starts), row_scores, config


def lowest_lod_only_loss(loss_of: Any, levels: int) -> float:
    """The lowest loss that gradient descent finds for free scores per LOD, from several starts."""
    lowest = math.inf
    for seed in range(2):
        per_lod = torch.randn(
            levels, generator=torch.Generator().manual_seed(seed)
        ).requires_grad_()
        optimizer = torch.optim.Adam([per_lod], lr=0.2)
        for _ in range(40):
            optimizer.zero_grad()
            loss = loss_of(per_lod)
            loss.backward()
            optimizer.step()
            lowest = min(lowest, float(loss.detach()))
    return lowest


@pytest.mark.parametrize(("max_lod", "bound"), [(1, LN2 - 1e-5), (2, 0.69)])
@pytest.mark.parametrize(
    "options",
    [{}, {"lens_split_margins": False}, {"lens_objective": "entry"}],
    ids=["split", "joint", "entry"],
)
def test_no_score_of_the_lod_alone_wins(
    max_lod: int, bound: float, options: dict[str, Any]
) -> None:
    rows, row_scores, config = allocator_batch(max_lod, sequences=24)
    assert rows.lods.max() == max_lod
    loss_of = loss_of_lods(rows, row_scores, config.model_copy(update=options))
    assert bound <= lowest_lod_only_loss(loss_of, max_lod + 1) < 0.72


def loss_of_lods(rows: Rows, row_scores: Tensor, config: MCConfig) -> Any:
    """The preference loss as a function of one score per LOD. The baseline is only a place
    holder here: it takes no part.
    """
    lods, starts = (torch.cat((x[:, :1], x), 1).flatten(0, 1) for x in (rows.lods, rows.starts))
    scores_of_rows = torch.cat((row_scores[:, :1], row_scores), 1).flatten()

    def loss_of(per_lod: Tensor) -> Tensor:
        return preference_loss(
            per_lod[lods], lods, starts, scores_of_rows, rows_per_sequence=5, config=config
        ).loss

    return loss_of


@pytest.mark.parametrize(("split", "bound"), [(False, 0.1), (True, 0.55)])
def test_supervising_only_the_worse_row_is_won_by_the_lod_alone(
    monkeypatch: pytest.MonkeyPatch, split: bool, bound: float
) -> None:
    """Why both directions teach, and that the test above discriminates: gists high and tokens
    low wins.

    The one-sided margins are relative to their LOD, so two of the three terms stay at ln 2: (0 +
    2 ln 2) / 3 = 0.46.
    """
    rows, row_scores, config = allocator_batch(1, sequences=24)
    monkeypatch.setattr(
        loss_module, "select_pairs", lambda gain, *rest: select_pairs(gain, *rest) & (gain > 0)
    )
    config = config.model_copy(update={"lens_split_margins": split})
    assert lowest_lod_only_loss(loss_of_lods(rows, row_scores, config), 2) < bound


def test_counts_that_differ_between_variants_let_the_lod_alone_win() -> None:
    """Why the number of LOD2 spans is shared: a span makes room for more open tokens, and here
    each is worth the same.
    """
    lowest = [
        lowest_lod_only_loss(
            loss_of_lods(*allocator_batch(2, sequences=24, shared=shared, worth=4.0)), 3
        )
        for shared in (True, False)
    ]
    assert lowest[0] >= 0.69
    assert lowest[1] < 0.65


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


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(1, 15), st.integers(0, 2**32))
def test_pairs_are_chosen_whole_the_best_row_first(rows: int, kept: int, seed: int) -> None:
    row_scores = torch.randn(3, rows, generator=torch.Generator().manual_seed(seed))
    kept = min(kept, rows * (rows - 1) // 2)
    possible = ~torch.eye(rows, dtype=torch.bool).expand(3, -1, -1)
    best = row_scores.argmin(1)
    chosen = select_pairs(gains(row_scores), possible, best, kept)
    assert torch.equal(chosen, chosen.transpose(1, 2))
    assert (chosen.sum((1, 2)) == 2 * kept).all()
    for sequence in range(3):
        size, top = gains(row_scores)[sequence].abs(), int(best[sequence])
        for other in range(rows):
            for a in range(rows):
                if a == other or not chosen[sequence, a, other]:
                    continue
                skipped = possible[sequence] & ~chosen[sequence]
                if top in (a, other):
                    assert not (skipped[top] & (size[top] > size[a, other])).any()
                else:
                    assert not skipped[top].any(), "pairs of the best variant come first"
                    assert not (skipped & (size > size[a, other])).any()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32))
def test_a_pair_of_which_only_one_direction_is_possible_can_be_chosen(rows: int, seed: int) -> None:
    """If all pairs are kept, all that is possible is chosen."""
    generator = torch.Generator().manual_seed(seed)
    possible = torch.rand(4, rows, rows, generator=generator) < 0.4
    possible &= ~torch.eye(rows, dtype=torch.bool)
    gain = gains(torch.randn(4, rows, generator=generator))
    chosen = select_pairs(gain, possible, torch.zeros(4, dtype=torch.int64), rows * rows)
    assert torch.equal(chosen, possible)


def test_a_sequences_pairs_do_not_depend_on_the_gains_of_another() -> None:
    row_scores = torch.tensor([[0.1, 0.2, 0.4, 0.5], [0.0, 1e20, 2e20, 3e20]])
    possible = ~torch.eye(4, dtype=torch.bool).expand(2, -1, -1)
    chosen = select_pairs(gains(row_scores), possible, torch.tensor([0, 0]), 1)
    pairs = [{(a, b) for a, b in part.nonzero().tolist()} for part in chosen]
    assert pairs == [{(0, 3), (3, 0)}] * 2


def test_moments_judge_gains_after_the_step_that_saw_them() -> None:
    batch = Batch(small_config(), sequences=2, seed=3)
    batch.row_scores[2] = batch.row_scores[1]
    state = GainMoments(beta=0.5)
    first = batch.loss(state=state)
    assert float(first.denominator) == 10, (
        "empty: v = 1 for each of the 12 moves whose gain is not 0"
    )
    assert float(state.std()) == 0, "reading does not update"
    state.update(*first.gain_moments)
    second = batch.loss(state=state)
    torch.testing.assert_close(second.denominator, batch.loss(state=None).denominator)
    state.update(torch.tensor(0.0), torch.tensor(12.0))
    expected = first.gain_moments * 0.5 + torch.tensor([0.0, 12.0])
    torch.testing.assert_close(torch.stack((state.sum_sq, state.count)), expected)
    torch.testing.assert_close(state.std(), (expected[0] / expected[1]).sqrt())
    restored = GainMoments(beta=0.5)
    restored.load_state_dict(state.state_dict())
    state.reset()
    assert torch.equal(batch.loss(state=state).loss, first.loss)
    torch.testing.assert_close(restored.std(), (expected[0] / expected[1]).sqrt())


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5])
def test_a_decay_that_forgets_nothing_or_grows_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"^beta = {beta} must lie in \[0, 1\)$"):
        GainMoments(beta)


def test_a_pause_without_gains_forgets_no_deviation() -> None:
    """Sum and number decay alike, also below one gain."""
    state = GainMoments(beta=0.5)
    assert float(state.std()) == 0
    state.update(torch.tensor(9.0), torch.tensor(1.0))
    for _ in range(4):
        assert float(state.std()) == 3
        state.update(torch.tensor(0.0), torch.tensor(0.0))


def test_without_decay_only_the_last_step_counts() -> None:
    state = GainMoments(beta=0)
    state.update(torch.tensor(100.0), torch.tensor(1.0))
    state.update(torch.tensor(8.0), torch.tensor(2.0))
    assert float(state.std()) == 2.0


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


def test_the_loss_has_the_type_of_the_scores_whatever_that_of_the_row_scores() -> None:
    batch = Batch(small_config(), sequences=2, seed=8)
    for of_scores in (torch.float32, torch.float64):
        for of_rows in (torch.float32, torch.float64):
            row_scores = batch.row_scores.to(of_rows)
            result = batch.loss(batch.scores.to(of_scores), row_scores=row_scores)
            assert {result.numerator.dtype, result.loss.dtype} == {of_scores}


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


@pytest.mark.parametrize(("paired", "fewest"), [(True, 2), (False, 3)])
def test_the_fewest_rows_are_two_that_are_paired(paired: bool, fewest: int) -> None:
    batch = Batch(small_config(lens_pair_baseline=paired), sequences=3, seed=10)
    result = batch.loss(rows_per_sequence=fewest)
    assert float(result.denominator) > 0


def test_a_replacement_is_given_the_moments_only_where_there_are_some() -> None:
    batch, calls = Batch(small_config(), sequences=2, seed=10), []
    loss = PreferenceLoss(batch.config, 4)
    plain = loss.function
    loss.function = lambda *inputs: calls.append(inputs) or plain(*inputs)
    inputs = batch.scores, batch.lods, batch.starts, batch.row_scores
    moments = torch.tensor([4.0, 2.0], dtype=torch.float64)
    found = loss(*inputs), loss(*inputs, moments)
    assert [len(call) for call in calls] == [4, 5]
    assert calls[1][4] is moments
    assert found[0].denominator != found[1].denominator
