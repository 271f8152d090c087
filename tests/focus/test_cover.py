"""Block-sized arithmetic equals its definition token by token; the starting cover and opened nodes
are what they say.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.focus import (
    block_lods,
    block_scores,
    coarsest_blocks,
    even_blocks,
    open_nodes,
    plan_of_blocks,
    uniform_blocks,
    units_used,
)
from mc_ds.focus.trades import trade
from mc_ds.geometry import Geometry, lod_map, start_counts
from mc_ds.variants import TrainingWCVariationAllocator
from tests.support.factories import geometries

CPU = torch.device("cpu")


def random_plan(geometry: Geometry, units: int, seed: int) -> tuple[Tensor, Tensor]:
    allocator = TrainingWCVariationAllocator(
        geometry,
        geometry.seq_len - units * (geometry.block_size - 1),
        lod2_probability=0.4,
        lod2_max_share=1.0,
    )
    lods, starts = allocator.sample(3, (seed, 0))
    return torch.from_numpy(lods), torch.from_numpy(starts)


@settings(max_examples=150, deadline=None)
@given(geometries(max_blocks=60), st.data())
def test_blocks_say_what_tokens_say(geometry: Geometry, data: st.DataObject) -> None:
    units, seed = data.draw(st.integers(0, geometry.max_units)), data.draw(st.integers(0, 2**31))
    lods, starts = random_plan(geometry, units, seed)
    scores = torch.randn(lods.shape, generator=torch.Generator().manual_seed(seed))
    covering = start_counts(starts, geometry.seq_len)[:, 1:] - 1
    of_tokens = scores.gather(1, covering)[:, : geometry.head_len].unflatten(
        1, (-1, geometry.block_size)
    )
    blocks = block_lods(lods, starts, geometry)
    assert torch.equal(
        blocks,
        lod_map(lods, start_counts(starts, geometry.seq_len))[
            :, : geometry.head_len : geometry.block_size
        ],
    )
    torch.testing.assert_close(block_scores(scores, lods, starts, geometry), of_tokens.mean(dim=-1))
    again = plan_of_blocks(blocks, geometry, lods.size(1))
    assert torch.equal(again[0], lods)
    assert torch.equal(again[1], starts)


def test_blocks_that_no_entry_covers_are_told_apart() -> None:
    geometry = Geometry(seq_len=40, block_size=4, max_lod=2, recent_tokens=8)
    starts = torch.arange(17, 40)[None]
    assert block_lods(torch.zeros_like(starts), starts, geometry).tolist() == [[-1] * 5 + [0] * 3]


def recent_first(geometry: Geometry) -> Iterator[tuple[int, int, int]]:
    """Expansions of the coarsest cover one by one, the most recent detail first: (first block, last
    block, LOD of the expanded node).
    """

    def open_node(level: int, node: int) -> Iterator[tuple[int, int, int]]:
        width = geometry.block_size ** (level - 1)
        yield node * width, (node + 1) * width, level
        if level > 1:
            for child in reversed(range(geometry.block_size)):
                yield from open_node(level - 1, node * geometry.block_size + child)

    for level in range(1, geometry.max_lod + 1):
        above = (
            geometry.head_nodes[level + 1] * geometry.block_size if level < geometry.max_lod else 0
        )
        for node in reversed(range(above, geometry.head_nodes[level])):
            yield from open_node(level, node)


@settings(max_examples=150, deadline=None)
@given(geometries(max_blocks=90), st.data())
def test_the_uniform_cover_opens_nodes_from_the_last_one_back(
    geometry: Geometry, data: st.DataObject
) -> None:
    opened = data.draw(st.integers(0, geometry.max_units))
    expected = coarsest_blocks(1, geometry, CPU)
    for _, (first, last, lod) in zip(range(opened), recent_first(geometry), strict=False):
        expected[:, first:last] = lod - 1
    length = geometry.coarsest_length + opened * (geometry.block_size - 1)
    blocks = uniform_blocks(2, geometry, length, CPU)
    assert torch.equal(blocks, expected.expand(2, -1))
    assert (units_used(blocks, geometry) == geometry.units(length)).all()


@settings(max_examples=150, deadline=None)
@given(geometries(max_blocks=90), st.data())
def test_the_even_cover_expands_level_by_level_from_the_last_node_back(
    geometry: Geometry, data: st.DataObject
) -> None:
    opened = data.draw(st.integers(0, geometry.max_units))
    nodes = [
        (level, node)
        for level in range(geometry.max_lod, 0, -1)
        for node in reversed(range(geometry.head_nodes[level]))
    ]
    expected = coarsest_blocks(1, geometry, CPU)
    for level, node in nodes[:opened]:
        width = geometry.block_size ** (level - 1)
        assert (expected[:, node * width : (node + 1) * width] == level).all()
        expected[:, node * width : (node + 1) * width] = level - 1
    length = geometry.coarsest_length + opened * (geometry.block_size - 1)
    blocks = even_blocks(2, geometry, length, CPU)
    assert torch.equal(blocks, expected.expand(2, -1))
    assert (units_used(blocks, geometry) == geometry.units(length)).all()


@settings(max_examples=80, deadline=None)
@given(geometries(max_blocks=60), st.data())
def test_opened_nodes_bring_chosen_blocks_to_the_surface_and_touch_nothing_else(
    geometry: Geometry, data: st.DataObject
) -> None:
    units, seed = data.draw(st.integers(0, geometry.max_units)), data.draw(st.integers(0, 2**31))
    blocks = block_lods(*random_plan(geometry, units, seed), geometry)
    chosen = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed)) < 0.05
    opened = open_nodes(blocks, geometry, chosen)
    assert (opened[chosen] <= 1).all()
    assert (opened <= blocks).all()
    assert torch.equal(opened[blocks <= 1], blocks[blocks <= 1])
    for row in range(len(blocks)):  # each opened node holds a chosen block
        for first in (opened[row] < blocks[row]).nonzero().flatten().tolist():
            width = geometry.block_size ** int(blocks[row, first] - 1)
            assert chosen[row, first // width * width : (first // width + 1) * width].any()
    # Still a cover: it makes a plan of its length, from which the same blocks are read.
    for row in opened.split(1):
        length = geometry.seq_len - int(units_used(row, geometry)) * (geometry.block_size - 1)
        assert torch.equal(block_lods(*plan_of_blocks(row, geometry, length), geometry), row)


def test_edit_penalty_weighs_on_both_sides_of_a_trade() -> None:
    geometry = Geometry(seq_len=4 * 6 + 4, block_size=4, max_lod=1, recent_tokens=4)
    blocks, values = (
        torch.tensor([[1, 1, 1, 0, 0, 0]]),
        torch.tensor([[0.9, 0.5, 0.4, 0.0, 0.1, 0.2]]),
    )

    def opened(edit_penalty: list[float] | None) -> list[int]:
        after = trade(
            blocks,
            values,
            torch.zeros_like(blocks, dtype=torch.bool),
            geometry,
            spare_units_R=torch.zeros(1, dtype=torch.int64),
            threshold=0.0,
            max_replacements=1,
            edit_penalty_Rn=None if edit_penalty is None else torch.tensor([edit_penalty]),
        )
        return (after[0] == 0).nonzero().flatten().tolist()

    assert opened(None) == [0, 4, 5]  # 0.9 against 0.0
    assert opened([0.5, 0.0, 0.0, 0.0, 0.0, 0.0]) == [1, 4, 5]  # 0.9 - 0.5 < 0.5
    assert opened([0.0, 0.0, 0.0, 0.15, 0.0, 0.0]) == [0, 3, 5]  # 0.0 + 0.15 > 0.1
    assert opened([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) == [3, 4, 5]  # worth less than anything costs


@pytest.mark.parametrize("max_lod", [1, 2, 3])
def test_the_work_does_not_grow_with_tokens(max_lod: int) -> None:
    """A million tokens: no tensor on the way is larger than a few numbers per block or entry."""
    geometry = Geometry(seq_len=2**20 + 77, block_size=32, max_lod=max_lod, recent_tokens=128)
    length = geometry.reachable_at_most(geometry.coarsest_length + 900)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        x.numel()
                        for x in torch.utils._pytree.tree_leaves(out)
                        if isinstance(x, Tensor)
                    ),
                ]
            )
            return out

    with Watch():
        blocks = uniform_blocks(1, geometry, length, CPU)
        lods, starts = plan_of_blocks(blocks, geometry, length)
        values = block_scores(torch.zeros(lods.shape), lods, starts, geometry)
        spare = units_used(blocks, geometry) - geometry.units(length)
        frozen = torch.zeros_like(blocks, dtype=torch.bool)
        trade(
            blocks, values, frozen, geometry, spare_units_R=spare, threshold=0.0, max_replacements=9
        )
        assert torch.equal(block_lods(lods, starts, geometry), blocks)
    assert largest <= 32 * (length + 32) + 2 * sum(geometry.head_nodes[1:])
