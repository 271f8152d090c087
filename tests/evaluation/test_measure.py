"""Cells of an evaluation: what counts as read, as right and as a fact too few."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mc_ds.config import FocusConfig
from mc_ds.evaluation.batches import BatchView
from mc_ds.evaluation.records import Cell, Measured
from mc_ds.focus import block_lods
from mc_ds.focus.controller import MCController
from mc_ds.focus.policies import policy
from mc_ds.focus.view import Plan
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
        Measured(torch.zeros(1), torch.ones(1, 4), Plan(torch.zeros_like(starts), starts)),
        [0],
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
    measured = Measured(torch.zeros(1), torch.ones(1, 4), Plan(lods, gist))
    cell.add(measured, [0], [sample], [0], 96)
    assert cell.hits == [True] * 5
    inside = TaskSample(
        np.zeros(97, np.int64), np.ones(4, np.float32), spans((0, 2), (2, 6), (4, 6)), spans(), None
    )
    cell.add(measured, [0], [inside], [1], 96)
    assert cell.hits[5:] == [False, False, True]


def test_what_a_context_leaves_out_is_not_read() -> None:
    starts = torch.tensor([[*range(8, 12), *range(20, 24), *range(84, 96)]])
    asked = spans((8, 12), (11, 13), (12, 20), (20, 24), (84, 96), (0, 1))
    sample = TaskSample(np.zeros(97, np.int64), np.ones(4, np.float32), asked, spans(), None)
    cell, plan = Cell(), Plan(torch.zeros_like(starts), starts)
    cell.add(Measured(torch.zeros(1), torch.ones(1, 4), plan), [0], [sample], [0], 96)
    assert cell.hits == [True, False, False, True, True, False]


def test_accuracy_counts_targets_and_does_not_weigh_them() -> None:
    starts = torch.arange(48, 96)[None]
    sample = TaskSample(
        np.zeros(97, np.int64), np.array([0.0, 0.5, 1.0, 1.0], np.float32), spans(), spans(), None
    )
    cell = Cell()
    right = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    plan = Plan(torch.zeros_like(starts), starts)
    cell.add(Measured(torch.tensor([2.0]), right, plan), [0], [sample], [3], 96)
    record = cell.record("a_task", "recency", 0.5, 48, 96)
    assert record.accuracy == pytest.approx(1 / 3)
    assert (record.ids, record.losses, record.hit_rate) == ([3], [2.0], None)


def plan_of(
    name: str, controller: MCController, spans: list[NDArray[np.int64]], length: int
) -> Plan:
    root, ids = model(run_config(MC)).eval(), tokens(MC, len(spans)) % VOCAB
    with torch.no_grad():
        nodes = root(ids)
    seeds = [(0, index) for index in range(len(spans))]
    view = BatchView(
        mc=MC,
        controller=controller,
        focus_config=FocusConfig(),
        forward=root,
        tokens=ids,
        nodes=nodes,
        lens_tokens=ids,
        spans=spans,
        seeds=seeds,
        device=CPU,
    )
    with controller.inference(), torch.no_grad():
        return policy(name).choose(view, length)


def test_the_oracle_opens_every_span_that_the_budget_has_room_for() -> None:
    """Spans of one token at the edges of blocks included, whichever blocks they lie in, at every
    length.
    """
    controller, geometry = MCController(None), MC.geometry
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
        plan = plan_of("oracle", controller, ranges, length)
        blocks = block_lods(plan.lods, plan.starts, geometry)
        for row, chosen in enumerate(wanted):
            # Opening a block under a coarser gist takes more than one unit: there is room where its
            # siblings fit too.
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
    """A token asked for in every block: no trade can win, so what the recent cover has open stays
    open.
    """
    controller, geometry = MCController(None), MC.geometry
    everywhere = np.stack(
        [np.arange(0, geometry.head_len, 4), np.arange(1, geometry.head_len, 4)], 1
    )
    for length in range(geometry.coarsest_length + 3, geometry.seq_len - 3, 6):
        plans = [plan_of(name, controller, [everywhere], length) for name in ("oracle", "uniform")]
        opened = [int((block_lods(p.lods, p.starts, geometry) == 0).sum()) for p in plans]
        assert opened[0] >= opened[1], length
