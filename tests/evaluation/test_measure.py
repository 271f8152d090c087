"""Cells of an evaluation: what counts as read, as right and as a fact too few."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_ds.config import FocusConfig
from mc_ds.evaluation.measure import Cell
from mc_ds.evaluation.policies import Case, Policies
from mc_ds.focus import block_lods
from mc_ds.focus.controller import MCController
from mc_ds.geometry import Geometry
from mc_ds.tasks import TaskSample, facts_for, make_family, open_blocks
from tests.support.factories import VOCAB, mc_config, model, run_config, tokens

MC = mc_config()
CPU = torch.device("cpu")


def spans(*ranges: tuple[int, int]) -> NDArray[np.int64]:
    return np.array(ranges, np.int64).reshape(-1, 2)


def test_a_span_is_read_only_where_all_of_its_tokens_stand_at_lod0() -> None:
    starts = torch.arange(48, 96)[None]
    asked = spans(
        (46, 50), (47, 48), (48, 49), (60, 64), (40, 48)
    )  # half inside the window, and outside by one token
    sample = TaskSample(
        np.zeros(97, np.int64), np.ones(4, np.float32), asked, spans((47, 50), (50, 52)), None
    )
    cell = Cell()
    cell.add(
        torch.zeros(1),
        torch.ones(1, 4),
        (torch.zeros_like(starts), starts),
        torch.ones(1, 4),
        [sample],
        [0],
        96,
    )
    assert cell.hits == [False, False, True, True, False]
    assert cell.distractor_hits == [False, True]
    gist = torch.cat(
        [torch.zeros(1, 1, dtype=torch.int64), torch.arange(4, 96)[None]], 1
    )  # tokens 0 to 3 as a gist
    lods = (gist == 0).long()
    cell = Cell()
    cell.add(torch.zeros(1), torch.ones(1, 4), (lods, gist), torch.ones(1, 4), [sample], [0], 96)
    assert cell.hits == [True] * 5
    inside = TaskSample(
        np.zeros(97, np.int64), np.ones(4, np.float32), spans((0, 2), (2, 6), (4, 6)), spans(), None
    )
    cell.add(torch.zeros(1), torch.ones(1, 4), (lods, gist), torch.ones(1, 4), [inside], [1], 96)
    assert cell.hits[5:] == [False, False, True]


def test_accuracy_counts_targets_and_does_not_weigh_them() -> None:
    starts = torch.arange(48, 96)[None]
    sample = TaskSample(
        np.zeros(97, np.int64), np.array([0.0, 0.5, 1.0, 1.0], np.float32), spans(), spans(), None
    )
    cell = Cell()
    right = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    cell.add(
        torch.tensor([2.0]),
        right,
        (torch.zeros_like(starts), starts),
        torch.from_numpy(sample.horizon_mask)[None],
        [sample],
        [3],
        96,
    )
    record = cell.record("a_task", "recency", 0.5, 48, 96)
    assert record.accuracy == pytest.approx(1 / 3)
    assert (record.ids, record.losses, record.hit_rate) == ([3], [2.0], None)


def test_the_oracle_opens_every_span_that_the_budget_has_room_for() -> None:
    """Spans of one token at the edges of blocks included, whichever blocks they lie in, at every length."""
    controller, geometry = MCController(None), MC.geometry
    policies = Policies(MC, controller, FocusConfig(), seed=0, device=CPU)
    with torch.no_grad():
        nodes = model(run_config(MC)).eval()(tokens(MC, 4) % VOCAB)
    rng = np.random.default_rng(0)
    for length in range(geometry.coarsest_length + 3, geometry.seq_len - 3, 6):
        room = open_blocks(geometry, length)
        wanted = [
            rng.choice(geometry.head_nodes[1], size=min(room // 2, 4), replace=False)
            for _ in range(4)
        ]
        offsets = [rng.integers(0, 4, len(blocks)) for blocks in wanted]
        ranges = [
            np.stack([4 * b + o, 4 * b + o + 1], 1) for b, o in zip(wanted, offsets, strict=True)
        ]
        with controller.inference(), torch.no_grad():
            blocks = block_lods(
                *policies.plan("oracle", Case(nodes, None, ranges, [0, 1, 2, 3]), length), geometry
            )
        for row, chosen in enumerate(wanted):
            # Opening a block under a coarser gist takes more than one unit: there is room where its siblings fit too.
            parents = len({int(block) // 4 for block in chosen})
            if len(chosen) + parents <= geometry.max_units - geometry.units(length):
                assert (blocks[row, chosen] == 0).all(), (length, chosen)


@pytest.mark.parametrize("name", ["recall", "niah_multivalue", "recall_hops2"])
def test_there_are_facts_for_two_questions_however_little_can_be_opened(name: str) -> None:
    family = make_family(name)
    geometry = Geometry(seq_len=1024, block_size=16, max_lod=1, recent_tokens=128)
    facts = facts_for(family, geometry, geometry.coarsest_length)
    assert open_blocks(geometry, geometry.coarsest_length) == 0
    assert facts >= 2 * family.min_facts
    assert facts % family.group_size == 0


def test_the_oracle_gives_up_no_open_block_where_more_is_asked_for_than_fits() -> None:
    """A token asked for in every block: no trade can win, so what the recent cover has open stays open."""
    controller, geometry = MCController(None), MC.geometry
    policies = Policies(MC, controller, FocusConfig(), seed=0, device=CPU)
    with torch.no_grad():
        nodes = model(run_config(MC)).eval()(tokens(MC, 1) % VOCAB)
    everywhere = np.stack(
        [np.arange(0, geometry.head_len, 4), np.arange(1, geometry.head_len, 4)], 1
    )
    for length in range(geometry.coarsest_length + 3, geometry.seq_len - 3, 6):
        with controller.inference(), torch.no_grad():
            plans = [
                policies.plan(name, Case(nodes, None, [everywhere], [0]), length)
                for name in ("oracle", "uniform")
            ]
        opened = [int((block_lods(*plan, geometry) == 0).sum()) for plan in plans]
        assert opened[0] >= opened[1], length
