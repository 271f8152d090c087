"""Geometry: reachable lengths, and everything that derives from a plan, against a reference
written out per entry.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.support.reference_geometry as reference
from mc_ds.geometry import (
    Geometry,
    label_positions,
    lod_map,
    moments,
    node_index,
    spans,
    start_counts,
)
from mc_ds.variants import TrainingWCVariationAllocator
from tests.support.factories import allocators, geometries


def rows_of(lods: torch.Tensor, starts: torch.Tensor) -> list[list[reference.Entry]]:
    return [
        list(zip(row_lods.tolist(), row_starts.tolist(), strict=True))
        for row_lods, row_starts in zip(lods, starts, strict=True)
    ]


def mixed_plan(
    allocator: TrainingWCVariationAllocator, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recency window and two variants."""
    pairs = zip(allocator.baseline(), allocator.sample(2, (seed, 0)), strict=True)
    lods, starts = (
        torch.cat([torch.from_numpy(base)[None], torch.from_numpy(variants)])
        for base, variants in pairs
    )
    return lods, starts


@settings(max_examples=60, deadline=None)
@given(allocators(max_blocks=20), st.integers(0, 1000))
def test_all_that_derives_from_a_plan_equals_the_reference(
    allocator: TrainingWCVariationAllocator, seed: int
) -> None:
    geometry, children = allocator.geometry, allocator.geometry.block_size
    lods, starts = mixed_plan(allocator, seed)
    rows = rows_of(lods, starts)
    table = {node: row for row, node in enumerate(reference.node_table(geometry))}

    assert spans(lods, children).tolist() == [
        [len(reference.tokens_of(entry, children)) for entry in row] for row in rows
    ]
    assert node_index(lods, starts, geometry).tolist() == [
        [table[entry] for entry in row] for row in rows
    ]
    assert label_positions(lods, starts, children).tolist() == [
        [reference.label(entry, children) for entry in row] for row in rows
    ]

    mean, deviation = moments(lods, starts, children)
    assert mean.dtype == deviation.dtype == torch.float64
    expected = torch.tensor(
        [[reference.mean_and_deviation(entry, children) for entry in row] for row in rows],
        dtype=torch.float64,
    )
    torch.testing.assert_close(torch.stack([mean, deviation], dim=-1), expected)

    counts = start_counts(starts, geometry.seq_len)
    assert counts.tolist() == [
        [reference.entries_before(row, token) for token in range(geometry.seq_len + 1)]
        for row in rows
    ]
    covering = lod_map(lods, counts)
    assert covering.tolist() == [
        [reference.lod_of_token(row, token, children) for token in range(geometry.seq_len)]
        for row in rows
    ]


@settings(max_examples=100, deadline=None)
@given(geometries())
def test_the_node_table_has_whole_nodes_level_after_level(geometry: Geometry) -> None:
    table = reference.node_table(geometry)
    assert sum(geometry.node_counts) == len(table)
    assert [node[0] for node in table] == [
        level for level, count in enumerate(geometry.node_counts) for _ in range(count)
    ]


@settings(max_examples=100, deadline=None)
@given(geometries(max_blocks=30))
def test_reachable_lengths_equal_brute_force(geometry: Geometry) -> None:
    reachable = reference.reachable_lengths(geometry)
    assert [
        length for length in range(geometry.seq_len + 2) if geometry.is_reachable(length)
    ] == reachable
    assert geometry.coarsest_length == reachable[0]
    for length in range(reachable[0], geometry.seq_len + 2):
        assert geometry.reachable_at_most(length) == max(x for x in reachable if x <= length)
        assert geometry.reachable_at_most(length + 0.5) == max(x for x in reachable if x <= length)
    with pytest.raises(ValueError, match=f"coarsest cover has {reachable[0]} entries"):
        geometry.reachable_at_most(reachable[0] - 0.5)


def test_a_trained_length_as_a_share_of_the_history_is_that_length() -> None:
    geometry = Geometry(seq_len=3000, block_size=32, max_lod=2, recent_tokens=128)
    lengths = [3000 - 31 * units for units in range(geometry.max_units + 1)]
    assert any(length / 3000 * 3000 < length for length in lengths)  # as floats have it
    assert [geometry.reachable_at_most(length / 3000 * 3000) for length in lengths] == lengths
    shortest = lengths[-1]
    assert shortest == geometry.coarsest_length
    assert (shortest - 1e-6) + 1e-6 == shortest, "the tolerance itself included"
    assert geometry.reachable_at_most(shortest - 1e-6) == shortest


@settings(max_examples=60, deadline=None)
@given(geometries(max_blocks=30))
def test_an_unreachable_length_names_its_neighbours_below_and_above(geometry: Geometry) -> None:
    reachable = reference.reachable_lengths(geometry)
    for length in set(range(1, geometry.seq_len + 5)) - set(reachable):
        neighbours = [
            *[x for x in reachable if x < length][-1:],
            *[x for x in reachable if x > length][:1],
        ]
        with pytest.raises(
            ValueError, match=rf"^train_wc_length = {length} is not reachable"
        ) as error:
            geometry.check_wc_length(length)
        assert "\n" not in str(error.value)
        assert [
            int(number) for number in re.findall(r"\d+", str(error.value).rpartition("use ")[2])
        ] == neighbours


@pytest.mark.parametrize(
    ("seq_len", "lengths"),
    [(4096, [2112]), (8192, [4224, 1248]), (16384, [8448, 4480]), (32768, [8960, 4992])],
)
def test_the_friendly_sizes_of_the_design_are_reachable(seq_len: int, lengths: list[int]) -> None:
    geometry = Geometry(seq_len=seq_len, block_size=32, max_lod=2, recent_tokens=128)
    for length in lengths:
        assert geometry.check_wc_length(length) is geometry
        assert length % 32 == 0


def test_a_history_of_another_length_has_the_same_levels_and_tail() -> None:
    geometry = Geometry(seq_len=100, block_size=4, max_lod=2, recent_tokens=10)
    assert geometry.with_length(41) == Geometry(41, block_size=4, max_lod=2, recent_tokens=10)


def test_the_tail_is_never_shorter_than_asked() -> None:
    geometry = Geometry(seq_len=100, block_size=8, max_lod=2, recent_tokens=5)
    assert geometry.head_len == 88
    assert Geometry(seq_len=100, block_size=8, max_lod=2, recent_tokens=4).head_len == 96, (
        "a whole number of blocks stays whole"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 1}, "block_size = 1"),
        ({"max_lod": 0}, "max_lod = 0"),
        ({"max_lod": 4}, "max_lod = 4"),
        ({"recent_tokens": 0}, "recent_tokens = 0"),
        ({"seq_len": 11}, "use seq_len >= 12"),
    ],
)
def test_an_impossible_geometry_says_what_would_be_right(
    change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(**{**dict(seq_len=64, block_size=8, max_lod=2, recent_tokens=4), **change})


def test_the_smallest_geometry_that_the_error_names_is_accepted() -> None:
    assert Geometry(seq_len=12, block_size=8, max_lod=2, recent_tokens=4).head_len == 8
