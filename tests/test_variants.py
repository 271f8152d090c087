"""The training allocator: the design's invariants over random configurations, and its law of
LOD2 counts.
"""

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.support.reference_geometry as reference
from mc_ds.geometry import Geometry
from mc_ds.variants import TrainingWCVariationAllocator
from tests.support.factories import allocators, mc_config

SEEDS = st.integers(0, 2**40)


def make(**changes: Any) -> TrainingWCVariationAllocator:
    shape = dict(seq_len=4096, block_size=32, max_lod=2, recent_tokens=128)
    geometry = Geometry(**{name: changes.pop(name, value) for name, value in shape.items()})
    return TrainingWCVariationAllocator(geometry, changes.pop("train_wc_length", 2112), **changes)


def test_the_allocator_of_a_configuration_has_its_settings() -> None:
    mc = mc_config(
        training_lod2_probability=0.3, training_lod2_max_share=0.7, random_variant_iterations=9
    )
    allocator = TrainingWCVariationAllocator.of(mc, 60)
    assert allocator.geometry == mc.geometry
    assert (allocator.train_wc_length, allocator.random_variant_iterations) == (60, 9)
    assert (allocator.lod2_probability, allocator.lod2_max_share) == (0.3, 0.7)


def placements(lods: np.ndarray, starts: np.ndarray) -> list[bytes]:
    return [
        row_lods.tobytes() + row_starts.tobytes()
        for row_lods, row_starts in zip(lods, starts, strict=True)
    ]


@settings(max_examples=300, deadline=None)
@given(allocators(), SEEDS, st.integers(1, 6))
def test_invariants(allocator: TrainingWCVariationAllocator, seed: int, variants: int) -> None:
    geometry = allocator.geometry
    lods, starts = allocator.sample(num_variants=variants, seed=(seed, 3))
    assert lods.dtype == starts.dtype == np.int64
    assert lods.shape == starts.shape == (variants, allocator.train_wc_length), "exact length"
    assert lods.min() >= 0, "level legality"
    assert lods.max() <= geometry.max_lod, "level legality"
    span = geometry.block_size**lods
    assert (starts % span == 0).all(), "alignment"
    assert (np.diff(starts, axis=1) > 0).all(), "strictly increasing"
    ends = np.concatenate([np.zeros((variants, 1), np.int64), starts + span], axis=1)
    assert (ends[:, :-1] == starts).all(), "no gap, no overlap"
    assert (ends[:, -1] == geometry.seq_len).all(), "coverage"
    assert (lods[starts + span > geometry.seq_len - geometry.recent_tokens] == 0).all(), (
        "tail purity"
    )
    histogram = np.sort(lods, axis=1)
    assert (histogram == histogram[0]).all(), "equal LOD histogram within the sequence"


@settings(max_examples=100, deadline=None)
@given(allocators())
def test_the_baseline_is_the_recency_window(allocator: TrainingWCVariationAllocator) -> None:
    lods, starts = allocator.baseline()
    seq_len, length = allocator.geometry.seq_len, allocator.train_wc_length
    assert starts.tolist() == list(range(seq_len - length, seq_len))
    assert not lods.any()
    assert lods.shape == (length,)
    assert lods.dtype == starts.dtype == np.int64


@settings(max_examples=100, deadline=None)
@given(allocators(max_blocks=30), SEEDS, st.integers(1, 4), st.integers(1, 4))
def test_a_variant_is_a_function_of_seed_and_index_alone(
    allocator: TrainingWCVariationAllocator, seed: int, fewer: int, more: int
) -> None:
    few = allocator.sample(num_variants=fewer, seed=(seed, 1))
    allocator.sample(num_variants=2, seed=(seed + 1, 5))  # what else was drawn does not matter
    many = allocator.sample(num_variants=fewer + more, seed=(seed, 1))
    for one, other in zip(few, many, strict=True):
        np.testing.assert_array_equal(one, other[:fewer])


def test_seed_sample_index_and_length_all_matter() -> None:
    plans = [
        make(train_wc_length=length).sample(num_variants=1, seed=seed)[1].tobytes()
        for length, seed in [
            (2112, (0, 0)),
            (2112, (0, 1)),
            (2112, (1, 0)),
            (2112, (1, 1)),
            (2143, (0, 0)),
        ]
    ]
    assert len(set(plans)) == len(plans)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(3, 8), SEEDS)
def test_variants_are_distinct_where_that_is_possible(
    children: int, blocks: int, seed: int
) -> None:
    """One of `blocks` blocks collapses: there are exactly as many variants as blocks, and
    patience finds them all.
    """
    seq_len = children * blocks + 1
    settings_ = dict(
        seq_len=seq_len,
        train_wc_length=seq_len - (children - 1),
        block_size=children,
        max_lod=1,
        recent_tokens=1,
    )
    patient = make(**settings_, random_variant_iterations=300)
    assert len(set(placements(*patient.sample(blocks, (seed, 0))))) == blocks
    assert len(set(placements(*patient.sample(blocks + 2, (seed, 0))))) == blocks, (
        "more than exist: all of them, and repeats"
    )


def test_redraws_are_bounded_and_leave_what_precedes_a_repeat() -> None:
    settings_ = dict(seq_len=9, train_wc_length=8, block_size=2, max_lod=1, recent_tokens=1)
    once = [
        placements(*make(**settings_, random_variant_iterations=1).sample(4, (0, i)))
        for i in range(50)
    ]
    thrice = [
        placements(*make(**settings_, random_variant_iterations=3).sample(4, (0, i)))
        for i in range(50)
    ]
    assert any(len(set(rows)) < 4 for rows in once), "a single draw makes repeats"
    assert sum(len(set(rows)) for rows in thrice) > sum(len(set(rows)) for rows in once)
    for before, after in zip(once, thrice, strict=True):
        first_repeat = next((i for i, row in enumerate(before) if row in before[:i]), len(before))
        assert after[:first_repeat] == before[:first_repeat]


@pytest.mark.parametrize(
    ("seq_len", "length", "most"),
    [(4096, 2112, 1), (8192, 1248, 3), (16384, 4480, 6), (2048, 1056, 0)],
    ids=lambda x: str(x),
)
def test_lod2_spans_range_as_the_design_says(seq_len: int, length: int, most: int) -> None:
    allocator = make(seq_len=seq_len, train_wc_length=length)
    seen = {int((allocator.sample(1, (0, i))[0] == 2).sum()) for i in range(200)}
    assert seen == set(range(most + 1))


def lod2_counts(allocator: TrainingWCVariationAllocator, sequences: int) -> Counter[int]:
    return Counter(int((allocator.sample(1, (7, i))[0] == 2).sum()) for i in range(sequences))


@pytest.mark.parametrize(
    ("blocks", "units", "probability", "share"),
    [
        (60, 30, 0.1, 0.5),
        (60, 30, 0.1, 1.0),
        (60, 30, 0.6, 1.0),
        (60, 15, 0.9, 1.0),  # three spans fit exactly
        (60, 45, 0.7, 0.3),
        (60, 14, 0.5, 0.05),  # u_max rounds to 0, but one span fits
        (60, 5, 0.9, 0.05),  # the same where it fits exactly
        (22, 24, 0.3, 0.5),  # two are forced
        (9, 9, 1.0, 1.0),  # two spans in the head, and the blocks between
    ],
)
def test_the_law_of_lod2_counts_equals_a_sequential_simulation(
    blocks: int, units: int, probability: float, share: float
) -> None:
    children, draws = 4, 2000
    allocator = make(
        seq_len=children * blocks + 3,
        train_wc_length=children * blocks + 3 - units * (children - 1),
        block_size=children,
        max_lod=2,
        recent_tokens=3,
        lod2_probability=probability,
        lod2_max_share=share,
    )
    rng = random.Random(0)
    law = dict(
        units=units,
        children=children,
        blocks=blocks,
        spans=blocks // children,
        probability=probability,
        max_share=share,
    )
    expected = Counter(reference.draw_lod2_count(rng, **law) for _ in range(draws))
    found = lod2_counts(allocator, draws)
    assert len(expected) == 1 or max(expected.values()) < draws
    for count in expected | found:
        p = (expected[count] + found[count]) / (2 * draws)
        tolerance = 5 * math.sqrt(2 * draws * p * (1 - p)) + 1
        assert abs(expected[count] - found[count]) <= tolerance, (count, expected, found)


def test_lod2_is_forced_where_blocks_alone_cannot_reach_the_length() -> None:
    """22 blocks and 24 units: two spans at least, whatever the probability."""
    allocator = make(
        seq_len=91, train_wc_length=91 - 24 * 3, block_size=4, recent_tokens=3, lod2_probability=0.0
    )
    assert set(lod2_counts(allocator, 50)) == {2}


@pytest.mark.parametrize("units", [0, 1, 12, 20, 21])
def test_three_levels_reach_every_length_down_to_the_coarsest(units: int) -> None:
    """8 blocks of 2: 8 + 4 + 2 units of LOD3 nodes, one more per level above."""
    allocator = make(
        seq_len=25,
        train_wc_length=25 - units,
        block_size=2,
        max_lod=3,
        recent_tokens=1,
        lod2_probability=0.5,
    )
    for i in range(20):
        lods, _ = allocator.sample(3, (0, i))
        assert (2**lods).sum(axis=1).tolist() == [25] * 3
    if units == 21:
        assert (lods == 3).sum(axis=1).tolist() == [3] * 3, "the coarsest cover"


def test_places_are_uniform() -> None:
    """Each block is folded, and each span taken, as often as any other: within 4.5 deviations
    over 4000 draws.
    """
    allocator = make(
        seq_len=4 * 22 + 3,
        train_wc_length=4 * 22 + 3 - 3 * 12,
        block_size=4,
        recent_tokens=3,
        lod2_probability=1.0,
        lod2_max_share=1,
    )
    lods, starts = (
        np.concatenate(rows)
        for rows in zip(*(allocator.sample(4, (0, i)) for i in range(1000)), strict=True)
    )
    folded = [((lods == 1) & (starts == 4 * block)).sum() for block in range(22)]
    taken = [((lods == 2) & (starts == 16 * span)).sum() for span in range(5)]
    assert sum(taken) == 4000 * 2, "12 units: two spans of 5 units"
    assert sum(folded) == 4000 * 2, "and two blocks"
    for count in taken:
        assert abs(count - 4000 * 0.4) < 4.5 * math.sqrt(4000 * 0.4 * 0.6)
    # 14 blocks stay free of spans: those under a span with chance 3/5, the two behind the last
    # span always.
    for block, count in enumerate(folded):
        chance = (0.6 if block < 20 else 1.0) * 2 / 14
        assert abs(count - 4000 * chance) < 4.5 * math.sqrt(4000 * chance * (1 - chance)), block


def test_no_variants_are_an_empty_plan() -> None:
    lods, starts = make().sample(0, (0, 0))
    assert lods.shape == starts.shape == (0, 2112)


def test_a_length_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2100 is not reachable.*use 2081 or 2112"):
        make(train_wc_length=2100)
