"""Windows: exact room, whole coverage as far as the budget goes, and the oldest nodes left out
beyond that.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.config import ConfigError, MCConfig
from mc_ds.inference.reading.window import check_budget, smallest_budget, window_of
from tests.support.factories import mc_config

MC = mc_config()


def test_a_history_of_the_trained_length_has_the_trained_context() -> None:
    known = MC.seq_len - MC.horizon_tokens + 1
    window = window_of(known, MC.train_wc_length, MC)
    assert window.geometry == MC.geometry
    assert (window.first, window.length, window.visible, window.seq_len) == (0, 48, 43, 96)
    # One more entry of budget reaches no longer context: lengths come in steps of K - 1.
    assert window_of(known, 50, MC).length == 48
    assert window_of(known, 51, MC).length == 51


@pytest.mark.parametrize("known", [1, 2, 30, 44])
def test_short_histories_are_read_token_by_token(known: int) -> None:
    window = window_of(known, 48, MC)
    assert window.geometry is None
    assert (window.first, window.visible, window.length) == (0, known - 1, known - 1 + 5)
    assert window_of(45, 48, MC).geometry is not None


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(2, 20), st.integers(1, 4000), st.data())
def test_windows_fit_the_budget_and_leave_out_as_little_as_possible(
    block: int, max_lod: int, recent: int, known: int, data: st.DataObject
) -> None:
    horizon = data.draw(st.integers(1, recent - 1))
    mc = MCConfig(
        seq_len=recent + block * 3, block_size=block, max_lod=max_lod, recent_tokens=recent, horizon_tokens=horizon,
        train_wc_length=recent + block * 3, num_random_variants=0,
    )  # fmt: skip
    budget = data.draw(st.integers(smallest_budget(mc), 400))
    window = window_of(known, budget, mc)
    assert window.length <= budget
    assert window.seq_len == known - 1 + horizon - window.first
    if window.geometry is None:
        assert window.first == 0
        assert window.length == window.seq_len
        return
    assert window.first % block**max_lod == 0
    assert window.geometry.seq_len == window.seq_len
    assert window.geometry.is_reachable(window.length)
    assert window.length + block - 1 > budget or window.length == window.seq_len
    if window.first:  # one more node would not fit
        more = window.geometry.with_length(window.seq_len + block**max_lod)
        assert more.coarsest_length > budget


def test_budgets_that_cannot_hold_every_history_are_refused() -> None:
    check_budget(smallest_budget(MC), MC)
    with pytest.raises(ConfigError, match=r"budget = 21 .* use at least 22"):
        check_budget(21, MC)
    for known in range(1, 400):
        assert window_of(known, smallest_budget(MC), MC).length <= smallest_budget(MC)
