"""Which pairs of variants are compared, and the scale of their gains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.preference import GainMoments, PreferenceLoss
from mc_ds.preference.pairs import gains, select_pairs
from tests.support.preferences import Batch, small_config


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
