"""Mixtures: each part counts its own samples, so that it reads all of its text once per epoch,
and has its share of the samples.
"""

import pickle
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.config import ConfigError
from mc_ds.data.sampling.interleave import BLOCK, Interleave
from mc_ds.data.sampling.windows import WindowSampler

SHARES = st.lists(
    st.one_of(st.floats(1e-4, 1e4), st.sampled_from([0.1, 0.5, 0.9, 1.0])), min_size=1, max_size=5
)


@settings(max_examples=30, deadline=None)
@given(shares=SHARES, seed=st.integers(0, 2**64 - 1), samples=st.integers(0, 3 * BLOCK))
def test_each_part_counts_its_samples_without_a_gap(
    shares: list[float], seed: int, samples: int
) -> None:
    mixture = Interleave(shares, seed=seed)
    seen = defaultdict(list)
    for index in range(samples):
        part, within = mixture.place(index)
        seen[part].append(within)
    counts = mixture.counts(samples)
    assert sum(counts) == samples
    assert [seen[part] for part in range(len(shares))] == [list(range(count)) for count in counts]


@settings(max_examples=30, deadline=None)
@given(shares=SHARES, seed=st.integers(0, 2**64 - 1), blocks=st.integers(0, 10**9))
def test_after_whole_blocks_shares_are_exact_however_many_there_are(
    shares: list[float], seed: int, blocks: int
) -> None:
    samples = blocks * BLOCK
    for share, count in zip(shares, Interleave(shares, seed=seed).counts(samples), strict=True):
        assert abs(count - samples * share / sum(shares)) <= len(shares) + 1e-9 * samples


@settings(max_examples=20, deadline=None)
@given(shares=SHARES, seed=st.integers(0, 2**64 - 1), samples=st.integers(7_500, 10**7))
def test_shares_are_kept_within_a_hundredth(shares: list[float], seed: int, samples: int) -> None:
    for share, count in zip(shares, Interleave(shares, seed=seed).counts(samples), strict=True):
        assert abs(count / samples - share / sum(shares)) < 0.01


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_every_window_of_a_part_is_drawn_once_per_epoch_of_it(share: float) -> None:
    windows = [WindowSampler(tokens, window=9, stride=8, seed=3) for tokens in (700, 1500)]
    mixture = Interleave([share, 1 - share], seed=3)
    starts: list[list[int]] = [[], []]
    for index in range(5000):
        part, within = mixture.place(index)
        starts[part].append(windows[part].start(within))
    for sampler, drawn in zip(windows, starts, strict=True):
        per_epoch = sampler.windows_per_epoch
        epochs = [drawn[n : n + per_epoch] for n in range(0, len(drawn) - per_epoch, per_epoch)]
        assert len(epochs) > 1
        for epoch in epochs:
            tiled = range(min(epoch), min(epoch) + 8 * per_epoch, 8)
            assert sorted(epoch) == list(tiled), "each window once"


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    def places(seed: int, order: range) -> dict[int, tuple[int, int]]:
        mixture = Interleave([0.3, 0.6, 0.1], seed=seed)
        return {index: mixture.place(index) for index in order}

    forward = places(1, range(2000))
    assert forward == places(1, range(1999, -1, -1))
    copy = pickle.loads(pickle.dumps(Interleave([0.3, 0.6, 0.1], seed=1)))
    assert copy.place(1234) == forward[1234], "as it is in a loader process, or after a restart"
    assert forward != places(2, range(2000))


def test_parts_fall_into_no_rhythm_with_the_steps() -> None:
    """With shares 1 : 1 every second step must not always read the same part."""
    mixture = Interleave([1, 1], seed=0)
    for period in (2, 4, 8, 16):
        first = [mixture.place(index)[0] for index in range(0, 4000 * period, period)]
        assert 0.4 < sum(first) / len(first) < 0.6


def test_shares_are_those_that_are_written() -> None:
    assert Interleave([0.1, 0.2, 0.7], seed=0).counts(10 * BLOCK) == [256, 512, 1792]


@pytest.mark.parametrize("shares", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_shares_must_be_positive_numbers(shares: list[float]) -> None:
    with pytest.raises(ConfigError, match="should be one or more positive numbers"):
        Interleave(shares, seed=0)
