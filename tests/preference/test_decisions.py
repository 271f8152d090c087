"""Decisions of moves against the per-entry reference, and the facts that make a constant score
mean nothing.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_ds.config import MCConfig
from mc_ds.preference import decide
from mc_ds.variants import TrainingWCVariationAllocator
from tests.support.reference_preference import as_tensors, baseline_row, decision, random_rows


@st.composite
def configs(draw: st.DrawFn) -> MCConfig:
    """Small geometries of one to three levels, with heads that are no multiple of the coarser
    spans and odd tails.
    """
    children = draw(st.integers(2, 4))
    max_lod = draw(st.integers(1, 3 if children == 2 else 2))
    recent = draw(st.integers(2, 6))
    seq_len = recent + draw(st.integers(children, 36))
    units = draw(st.integers(0, _max_units(seq_len, recent, children, max_lod)))
    return MCConfig(
        seq_len=seq_len,
        block_size=children,
        max_lod=max_lod,
        train_wc_length=seq_len - units * (children - 1),
        recent_tokens=recent,
        horizon_tokens=1,
        num_random_variants=3,
    )


def _max_units(seq_len: int, recent: int, children: int, max_lod: int) -> int:
    head = (seq_len - recent) // children * children
    return sum(head // children**level for level in range(1, max_lod + 1))


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(0, 2**32))
def test_decisions_equal_the_per_entry_reference(config: MCConfig, seed: int) -> None:
    rows = [baseline_row(config), *random_rows(random.Random(seed), config, 3)]
    lods, starts = as_tensors(rows)
    decisions = decide(lods[None], starts[None], config.geometry)
    for a in range(4):
        for b in range(4):
            for i in range(len(rows[a])):
                d, w = decision(rows[a], rows[b], i, config)
                expected = (w if d > 0 else 0.0, w if d < 0 else 0.0)
                found = (float(decisions.expand[0, a, b, i]), float(decisions.collapse[0, a, b, i]))
                assert found == pytest.approx(expected, abs=1e-6), (rows[a], rows[b], i)


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(0, 2**32))
def test_between_variants_expansions_weigh_as_much_as_collapses(
    config: MCConfig, seed: int
) -> None:
    lods, starts = as_tensors(random_rows(random.Random(seed), config, 3))
    decisions = decide(lods[None], starts[None], config.geometry)
    torch.testing.assert_close(decisions.expand.sum(-1), decisions.collapse.sum(-1))
    # What a -> b adds, b -> a frees.
    torch.testing.assert_close(decisions.expand.sum(-1), decisions.collapse.sum(-1).transpose(1, 2))
    assert not ((decisions.expand > 0) & (decisions.collapse > 0)).any()
    assert not decisions.expand.diagonal(dim1=1, dim2=2).any()


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(256, 8, 2, 172), (512, 8, 2, 183), (270, 4, 2, 150), (256, 16, 1, 136)]),
    st.integers(0, 2**32),
)
def test_decisions_on_the_training_allocators_plans(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    seq_len, children, max_lod, length = shape
    config = MCConfig(
        seq_len=seq_len,
        block_size=children,
        max_lod=max_lod,
        train_wc_length=length,
        recent_tokens=24,
        horizon_tokens=8,
        num_random_variants=2,
    )
    allocator = TrainingWCVariationAllocator(
        config.geometry,
        length,
        lod2_probability=0.5,
    )
    lods, starts = (torch.from_numpy(x) for x in allocator.sample(2, (0, seed)))
    rows = [
        list(zip(*(x.tolist() for x in row), strict=True)) for row in zip(lods, starts, strict=True)
    ]
    decisions = decide(lods[None], starts[None], config.geometry)
    signed = (decisions.expand - decisions.collapse)[0, 0, 1]
    expected = [
        d * w for d, w in (decision(rows[0], rows[1], i, config) for i in range(0, length, 3))
    ]
    torch.testing.assert_close(signed[::3], torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(signed.sum(), torch.tensor(0.0), atol=1e-4, rtol=0)


def test_weights_of_a_two_level_move_by_hand() -> None:
    """K = 2, head of 8 tokens, tail of 2. Opening an LOD2 gist fully adds three entries; its two
    LOD1 halves add one.
    """
    config = MCConfig(
        seq_len=10,
        block_size=2,
        max_lod=2,
        train_wc_length=7,
        recent_tokens=2,
        horizon_tokens=1,
        num_random_variants=2,
    )
    coarse_left = [(2, 0), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 9)]
    mixed = [(1, 0), (0, 2), (0, 3), (1, 4), (1, 6), (0, 8), (0, 9)]
    lods, starts = as_tensors([coarse_left, mixed])
    decisions = decide(lods[None], starts[None], config.geometry)
    assert decisions.expand[0, 0, 1].tolist() == [2, 0, 0, 0, 0, 0, 0]
    assert decisions.collapse[0, 0, 1].tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert decisions.expand[0, 1, 0].tolist() == [0, 0, 0, 1, 1, 0, 0]
    third = pytest.approx(2 / 3)
    assert decisions.collapse[0, 1, 0].tolist() == [third, third, third, 0, 0, 0, 0]


def test_the_tail_and_what_the_other_row_does_not_cover_decide_nothing() -> None:
    """The baseline covers tokens 3..9 only: the gist at 2 reaches out of it, the gist at 4 does
    not.
    """
    config = MCConfig(
        seq_len=10,
        block_size=2,
        max_lod=1,
        train_wc_length=7,
        recent_tokens=2,
        horizon_tokens=1,
        num_random_variants=2,
    )
    variant = [(0, 0), (0, 1), (1, 2), (1, 4), (1, 6), (0, 8), (0, 9)]
    lods, starts = as_tensors([baseline_row(config), variant])
    decisions = decide(lods[None], starts[None], config.geometry)
    assert decisions.expand[0, 1, 0].tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert not decisions.collapse[0, 1, 0].any()
    # From the baseline: token 3 is alone under the gist at 2 (nothing is freed); 4..7 fold in
    # twos; 8 and 9 are tail.
    assert decisions.collapse[0, 0, 1].tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert not decisions.expand[0, 0, 1].any()
