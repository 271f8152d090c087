"""Focus: coverage, alignment and budget hold after every edit, whatever the scores; what the scores
ask for happens.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.config.focus import FocusConfig
from mc_ds.focus import FocusAllocator, block_lods, coarsest_blocks, plan_of_blocks, units_used
from mc_ds.focus.controller import InvariantError, MCController
from mc_ds.focus.trades import trade
from mc_ds.geometry import Geometry
from mc_ds.variants import TrainingWCVariationAllocator

CONTROLLER = MCController(None)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, int]:
    block = draw(st.integers(2, 5))
    max_lod = draw(st.integers(1, 3))
    recent = draw(st.integers(1, 9))
    seq_len = draw(st.integers(block + recent, 220))
    geometry = Geometry(seq_len=seq_len, block_size=block, max_lod=max_lod, recent_tokens=recent)
    units = draw(st.integers(0, geometry.max_units))
    return geometry, seq_len - units * (block - 1)


def random_plan(
    geometry: Geometry, length: int, rows: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    allocator = TrainingWCVariationAllocator(
        geometry,
        length,
        lod2_probability=0.3,
        lod2_max_share=1.0,
    )
    lods, starts = allocator.sample(rows, (seed, 0))
    return torch.from_numpy(lods), torch.from_numpy(starts)


def assert_is_cover(
    lods: torch.Tensor, starts: torch.Tensor, geometry: Geometry, length: int
) -> None:
    spans = geometry.block_size**lods
    assert lods.shape[1] == length
    assert (starts[:, 0] == 0).all()
    assert ((starts + spans)[:, -1] == geometry.seq_len).all()
    assert ((starts + spans)[:, :-1] == starts[:, 1:]).all()
    assert (starts % spans == 0).all()
    assert ((lods == 0) | (starts + spans <= geometry.head_len)).all()


SCORES = [
    "noise",
    "ties",
    "equal",
    "extreme",
    "largest",
    "some NaN",
    "all NaN",
    "infinite",
    "everything",
]


def adversarial(kind: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    noise = torch.rand(shape, generator=generator) * 2 - 1
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 0.0])
    return {
        "noise": noise,
        "ties": noise.sign(),
        "equal": torch.full(shape, 0.5),
        "extreme": noise.sign() * 1e30,
        "largest": noise.sign() * 3.4e38,
        "some NaN": noise.masked_fill(noise > 0.5, torch.nan),
        "all NaN": torch.full(shape, torch.nan),
        "infinite": noise.sign() * torch.inf,
        "everything": odd[(noise.abs() * 5.99).long()],
    }[kind]


def allocate(geometry: Geometry, **knobs: object) -> FocusAllocator:
    return FocusAllocator(CONTROLLER, geometry, FocusConfig(**knobs))


@settings(max_examples=120, deadline=None)
@given(
    geometries(),
    st.integers(0, 2**31),
    st.sampled_from(SCORES),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_every_edit_keeps_the_cover_and_the_budget(
    case: tuple[Geometry, int], seed: int, kind: str, most: int, cooldown: int
) -> None:
    geometry, length = case
    lods, starts = random_plan(geometry, length, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    seen = []

    def score(lods: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        assert_is_cover(lods, starts, geometry, length)
        seen.append(lods)
        return adversarial(kind, lods.shape, generator)

    with CONTROLLER.inference():
        focused = allocate(
            geometry, iterations=4, max_replacements=most, cooldown=cooldown, threshold=0.0
        ).focus(lods, starts, score=score)
    assert_is_cover(*focused, geometry, length)
    assert len(seen) == 4


@settings(max_examples=80, deadline=None)
@given(geometries(), st.data())
def test_any_cover_comes_to_any_reachable_budget(
    case: tuple[Geometry, int], data: st.DataObject
) -> None:
    geometry, length = case
    target = geometry.seq_len - data.draw(st.integers(0, geometry.max_units)) * (
        geometry.block_size - 1
    )
    lods, starts = random_plan(geometry, length, 2, 1)
    with CONTROLLER.inference():
        allocator = allocate(geometry, iterations=3)
        focused = allocator.focus(
            lods, starts, score=lambda _, starts: torch.sin(starts * 1.7), wc_length=target
        )
    assert_is_cover(*focused, geometry, target)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 2**31), st.sampled_from(SCORES), st.sampled_from(SCORES))
def test_odd_rescored_blocks_and_odd_edit_penalty_keep_the_cover_and_the_budget(
    case: tuple[Geometry, int], seed: int, rescored: str, edit_penalty: str
) -> None:
    geometry, length = case
    lods, starts = random_plan(geometry, length, 2, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = torch.Size([2, geometry.head_nodes[1]])
    target = geometry.seq_len - seed % (geometry.max_units + 1) * (geometry.block_size - 1)
    with CONTROLLER.inference():
        focused = allocate(geometry, iterations=3).focus(
            lods,
            starts,
            score=lambda lods, _: torch.randn(lods.shape, generator=generator),
            wc_length=target,
            rescored=adversarial(rescored, shape, generator),
            edit_penalty=adversarial(edit_penalty, shape, generator).abs(),
        )
    assert_is_cover(*focused, geometry, target)


@settings(max_examples=80, deadline=None)
@given(geometries(), st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 3))
def test_no_round_trades_too_much_and_no_block_is_edited_while_it_cools(
    case: tuple[Geometry, int], seed: int, most: int, cooldown: int
) -> None:
    geometry, length = case
    generator = torch.Generator().manual_seed(seed)
    seen: list[torch.Tensor] = []

    def score(lods: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        seen.append(block_lods(lods, starts, geometry))
        return torch.randn(lods.shape, generator=generator)

    with CONTROLLER.inference():
        allocator = allocate(
            geometry, iterations=6, max_replacements=most, cooldown=cooldown, memory=False
        )
        seen.append(
            block_lods(
                *allocator.focus(*random_plan(geometry, length, 2, seed), score=score), geometry
            )
        )
    edited_at = torch.full_like(seen[0], -1 - cooldown)
    for number, (before, after) in enumerate(itertools.pairwise(seen)):
        assert (number - edited_at[before != after] > cooldown).all()
        edited_at[before != after] = number
        for row_before, row_after in zip(before.tolist(), after.tolist(), strict=True):
            expanded = 0
            for level in range(1, geometry.max_lod + 1):
                width = geometry.block_size ** (level - 1)
                for first in range(0, geometry.head_nodes[level] * width, width):
                    expanded += row_before[first] == level > row_after[first]
            assert expanded <= most


def test_blocks_and_plans_are_inverse() -> None:
    geometry = Geometry(seq_len=300, block_size=4, max_lod=3, recent_tokens=20)
    lods, starts = random_plan(geometry, 300 - 3 * 40, 5, 0)
    blocks = block_lods(lods, starts, geometry)
    assert (units_used(blocks, geometry) == 40).all()
    again = plan_of_blocks(blocks, geometry, lods.size(1))
    assert torch.equal(again[0], lods)
    assert torch.equal(again[1], starts)
    coarsest = coarsest_blocks(2, geometry, torch.device("cpu"))
    assert (units_used(coarsest, geometry) == geometry.max_units).all()


def test_the_wanted_block_opens_from_two_levels_down() -> None:
    """A score that is high on whatever covers token 37 brings it from LOD2 to LOD0, within one
    refocus and the same budget.
    """
    geometry = Geometry(seq_len=16 * 12 + 8, block_size=4, max_lod=2, recent_tokens=8)
    blocks = coarsest_blocks(1, geometry, torch.device("cpu"))
    blocks[:, -8:] = 0
    length = int(geometry.seq_len - units_used(blocks, geometry) * 3)
    lods, starts = plan_of_blocks(blocks, geometry, length)

    def score(lods: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return ((starts <= 37) & (starts + 4**lods > 37)).float()

    with CONTROLLER.inference():
        focused = allocate(geometry, iterations=2, cooldown=0).focus(lods, starts, score=score)
    assert block_lods(*focused, geometry)[0, 37 // 4] == 0
    assert_is_cover(*focused, geometry, length)


def test_trades_obey_threshold_and_number() -> None:
    geometry = Geometry(seq_len=4 * 10 + 4, block_size=4, max_lod=1, recent_tokens=4)
    blocks = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0]])
    values = torch.tensor([[0.9, 0.5, 0.3, 0.0, -1.0, 0.8, 0.45, 0.2, 0.1, 0.0]])

    def opened(**knobs: float) -> list[int]:
        none = torch.zeros_like(blocks, dtype=torch.bool)
        knobs = {"threshold": 0.0, "max_replacements": 9, **knobs}
        after = trade(
            blocks, values, none, geometry, spare_units_R=torch.zeros(1, dtype=torch.int64), **knobs
        )  # type: ignore[arg-type]
        return (after[0] == 0).nonzero().flatten().tolist()

    assert opened() == [0, 1, 2, 5, 6]  # 0.9 > 0.0, 0.5 > 0.1, 0.3 > 0.2, then 0.0 < 0.45
    assert opened(max_replacements=1) == [0, 5, 6, 7, 8]
    assert opened(threshold=0.2) == [0, 1, 5, 6, 7]  # the third trade would gain 0.1


def test_memory_keeps_what_was_read_and_iterations_move_on() -> None:
    """Gists all look alike and open blocks show that they are worthless: with memory the search
    visits every block, without it returns.
    """
    geometry = Geometry(seq_len=4 * 12 + 4, block_size=4, max_lod=1, recent_tokens=4)
    wanted = 11

    def visited(memory: bool) -> set[int]:
        blocks = torch.ones(1, 12, dtype=torch.int64)
        blocks[0, 0] = 0
        lods, starts = plan_of_blocks(blocks, geometry, geometry.seq_len - 3 * 11)
        seen: set[int] = set()

        def score(lods: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            seen.update((block_lods(lods, starts, geometry)[0] == 0).nonzero().flatten().tolist())
            block = starts // 4
            return torch.where(
                lods == 1, 0.5 - 0.001 * block, torch.where(block == wanted, 1.0, -0.5)
            )

        with CONTROLLER.inference():
            allocate(geometry, iterations=14, memory=memory, cooldown=0).focus(
                lods, starts, score=score
            )
        return seen

    assert wanted in visited(memory=True)
    assert wanted not in visited(memory=False)


def test_memory_keeps_the_latest_reading() -> None:
    """A block that reads as good, then as bad, is remembered as bad, though its gist always looks
    good.
    """
    geometry = Geometry(seq_len=4 * 3 + 4, block_size=4, max_lod=1, recent_tokens=4)
    readings = iter([0.9, -0.9, -0.9, -0.9])
    states: list[list[int]] = []

    def score(lods: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        states.append(block_lods(lods, starts, geometry)[0].tolist())
        return torch.where(
            lods == 1, 0.5 - 0.1 * (starts // 4), torch.where(starts // 4 == 0, next(readings), 0.0)
        )

    lods, starts = plan_of_blocks(torch.tensor([[0, 1, 1]]), geometry, geometry.seq_len - 3 * 2)
    with CONTROLLER.inference():
        allocate(geometry, iterations=4, cooldown=0).focus(lods, starts, score=score)
    assert states == [[0, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_cooldown_stops_ping_pong() -> None:
    """Scores that flip every round undo each edit at once without a cool-down, and not within
    it.
    """
    geometry = Geometry(seq_len=4 * 2 + 4, block_size=4, max_lod=1, recent_tokens=4)

    def history(cooldown: int) -> list[int]:
        lods, starts = plan_of_blocks(torch.tensor([[0, 1]]), geometry, geometry.seq_len - 3)
        states: list[int] = []

        def score(lods: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            states.append(int(block_lods(lods, starts, geometry)[0].argmin()))
            return torch.where(lods == 1, 1.0, -1.0)

        with CONTROLLER.inference():
            allocate(geometry, iterations=6, cooldown=cooldown, memory=False).focus(
                lods, starts, score=score
            )
        return states

    assert history(0) == [0, 1, 0, 1, 0, 1]
    assert history(2) == [0, 1, 1, 1, 0, 0]


def test_focus_cannot_be_had_in_training() -> None:
    geometry = Geometry(seq_len=64, block_size=4, max_lod=1, recent_tokens=8)
    with pytest.raises(InvariantError, match="inference"):
        allocate(geometry)
    with pytest.raises(InvariantError, match="inference"):
        FocusAllocator(CONTROLLER, geometry, FocusConfig())
    with CONTROLLER.inference():
        allocator = allocate(geometry)
    lods, starts = random_plan(geometry, 64 - 3 * 4, 1, 0)
    with pytest.raises(InvariantError, match="inference"):
        allocator.focus(lods, starts, score=lambda lods, _: torch.zeros(np.shape(lods)))
    with CONTROLLER.inference(), pytest.raises(ValueError, match="reachable"):
        allocator.focus(
            lods, starts, score=lambda lods, _: torch.zeros(np.shape(lods)), wc_length=51
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"wc_length": 0}, "wc_length = 0 is not reachable"),
        ({"iterations": 0}, "iterations = 0"),
        ({"iterations": -2}, "iterations = -2"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(wrong: dict[str, int], message: str) -> None:
    geometry = Geometry(seq_len=64, block_size=4, max_lod=1, recent_tokens=8)
    plan = random_plan(geometry, 64 - 3 * 4, 1, 0)
    with CONTROLLER.inference(), pytest.raises(ValueError, match=message):
        allocate(geometry).focus(*plan, score=lambda lods, _: torch.zeros(lods.shape), **wrong)


def test_a_plan_that_leaves_out_the_beginning_is_refused() -> None:
    geometry = Geometry(seq_len=64, block_size=4, max_lod=1, recent_tokens=8)
    starts = torch.arange(12, 64)[None]
    with CONTROLLER.inference(), pytest.raises(ValueError, match="begins at token 12"):
        allocate(geometry).focus(
            torch.zeros_like(starts), starts, score=lambda lods, _: torch.zeros(lods.shape)
        )


def test_what_was_rescored_outweighs_what_is_scored_and_no_coarser_node_is_expanded() -> None:
    geometry = Geometry(seq_len=4 * 16 + 4, block_size=4, max_lod=2, recent_tokens=4)
    blocks = torch.tensor([[2] * 4 + [1] * 4 + [0] * 4 + [2] * 4])
    length = geometry.seq_len - int(units_used(blocks, geometry)) * 3
    lods, starts = plan_of_blocks(blocks, geometry, length)

    def score(lods: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Coarse nodes above all, then block 5."""
        return (lods == 2).float() + 0.5 * (starts // 4 == 5)

    rescored = torch.full((1, 16), torch.nan)
    rescored[0, 6], rescored[0, 5] = 0.9, -0.9
    with CONTROLLER.inference():
        free = block_lods(
            *allocate(geometry, iterations=1).focus(lods, starts, score=score), geometry
        )
        plan = allocate(geometry, iterations=3).focus(
            lods, starts, score=score, rescored=rescored, expand_up_to=1
        )
        bound = block_lods(*plan, geometry)
    assert (free[0, :4] < 2).all()
    assert bound[0].tolist()[:8] == [2] * 4 + [1, 1, 0, 1]
    assert_is_cover(*plan, geometry, length)


@settings(max_examples=80, deadline=None)
@given(geometries(), st.integers(0, 2**31), st.integers(0, 40), st.integers(0, 2))
def test_a_bound_on_expansions_never_costs_the_length(
    case: tuple[Geometry, int], seed: int, other: int, up_to: int
) -> None:
    """Also from a plan of another length, which coarser nodes alone may be able to fill."""
    geometry, length = case
    start_units = min(other, geometry.max_units)
    plan = random_plan(
        geometry, geometry.seq_len - start_units * (geometry.block_size - 1), 2, seed
    )
    generator = torch.Generator().manual_seed(seed)
    with CONTROLLER.inference():
        focused = allocate(geometry).focus(
            *plan,
            score=lambda lods, starts: torch.randn(lods.shape, generator=generator),
            wc_length=length,
            expand_up_to=up_to,
        )
    assert_is_cover(*focused, geometry, length)
