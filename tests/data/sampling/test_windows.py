"""Sampling without a history: every window once per epoch, another order and phase in each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_ds.data.sampling.windows import WindowSampler, permute


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_look_random() -> None:
    size, keys = 1000, 30
    images = np.array([[permute(i, size, key) for i in range(size)] for key in range(keys)])
    correlations = [np.corrcoef(np.arange(size), row)[0, 1] for row in images]
    assert np.abs(correlations).max() < 0.15
    assert abs(np.corrcoef(images)[~np.eye(keys, dtype=bool)]).max() < 0.2
    assert abs(np.diff(images, axis=1) == 1).mean() < 0.01, "neighbours must not stay neighbours"


@given(tokens=st.integers(9, 400), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_an_epoch_reads_every_window_once_and_inside_the_corpus(
    tokens: int, seed: int, epoch: int
) -> None:
    sampler = WindowSampler(tokens, window=9, stride=8, seed=seed)
    first = epoch * sampler.windows_per_epoch
    starts = sorted(sampler.start(first + i) for i in range(sampler.windows_per_epoch))
    assert starts[0] >= 0
    assert starts[-1] + 9 <= tokens
    assert set(np.diff(starts)) <= {8}, "windows of an epoch tile a stretch of the corpus"
    assert starts[0] < 8, "at most one stride of tokens is left out at the start ..."
    assert tokens - (starts[-1] + 9) < 16, "... and less than two at the end"


def test_epochs_differ_in_order_and_phase_and_reach_every_phase() -> None:
    sampler = WindowSampler(1000, window=9, stride=8, seed=3)
    epochs = [
        [sampler.start(e * sampler.windows_per_epoch + i) for i in range(sampler.windows_per_epoch)]
        for e in range(100)
    ]
    assert {min(epoch) for epoch in epochs} == set(range(8))
    orders = [tuple(np.argsort(epoch)) for epoch in epochs]
    assert len(set(orders)) == len(orders)


def test_start_is_a_pure_function_of_seed_and_index() -> None:
    def starts(seed: int, order: range) -> dict[int, int]:
        sampler = WindowSampler(5000, window=9, stride=8, seed=seed)
        return {i: sampler.start(i) for i in order}

    assert starts(1, range(2000)) == starts(1, range(1999, -1, -1))
    assert starts(1, range(2000)) != starts(2, range(2000))


def test_a_corpus_shorter_than_a_window_is_refused() -> None:
    assert WindowSampler(9, window=9, stride=8, seed=0).start(5) == 0
    with pytest.raises(
        ValueError,
        match=r"the corpus has 8 tokens, a sample needs 9: use more text or mc.seq_len <= 7",
    ):
        WindowSampler(8, window=9, stride=8, seed=0)
