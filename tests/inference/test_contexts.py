"""What a session's LensNet decides: searched blocks come to the surface, following edits keep the
prefix, stand-in tails are read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mc_ds.focus import even_blocks, plan_of_blocks, uniform_blocks
from mc_ds.focus.controller import MCController
from mc_ds.inference import InferenceModel, Session
from mc_ds.inference.reading import candidates
from mc_ds.inference.reading.search import BlockSearch
from tests.support.sessions import assert_covers, history, inference_model

BUDGET, HORIZON, BLOCK = 60, 5, 4


class Scores(nn.Module):
    """Stands in for LensNet: keeps what it was given, and scores by a function of (lods,
    starts).
    """

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score, self.seen = score, list[tuple[Tensor, ...]]()

    def forward(self, entries: Tensor, lods: Tensor, starts: Tensor, index: Tensor) -> Tensor:
        self.seen.append((entries, lods, starts, index))
        return self.score(lods, starts)


def session_with(
    net: InferenceModel, score: Any, length: int, **options: Any
) -> tuple[Session, Scores]:
    scores = Scores(score)
    net.controller = MCController(scores)
    session = net.session(options.pop("policy", "lens"), options.pop("budget", BUDGET), **options)
    session.ingest(history(length))
    return session, scores


def rescored_by(session: Session) -> NDArray[np.float32]:
    assert session.reader.context is not None
    assert session.reader.context.rescored is not None
    return session.reader.context.rescored


@pytest.mark.parametrize(("search", "opened"), [(0, False), (6, True)])
def test_a_fact_that_only_its_own_block_shows_is_reached_by_the_search(
    monkeypatch: pytest.MonkeyPatch, search: int, opened: bool
) -> None:
    """LensNet sees nothing in a coarse node; the block's own index vector does match, among 125
    blocks in 60 entries.
    """
    target = 37
    net = inference_model(position_scheme="order")

    def found(self: BlockSearch, tail: Tensor, first: int, last: int) -> Tensor:
        return -(torch.arange(first, last) - target).abs().float()

    monkeypatch.setattr(BlockSearch, "scores", found)
    session, _ = session_with(
        net,
        lambda lods, starts: ((starts // BLOCK == target) & (lods <= 1)).float(),
        500,
        search=search,
    )
    lods, starts = session.working_context()
    assert_covers(lods, starts, 0, 500, BLOCK)
    at = (starts // BLOCK == target) & (lods == 0)
    assert at.sum() == (BLOCK if opened else 0)
    # Generating keeps it open, and stays in the budget.
    for _ in session.stream(17):
        lods, starts = session.working_context()
        assert len(lods) <= BUDGET
        assert_covers(lods, starts, 0, len(session), BLOCK)
    assert ((starts // BLOCK == target) & (lods == 0)).sum() == (BLOCK if opened else 0)


def test_lensnet_names_the_candidates_among_the_best_matching_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The block that LensNet wants is only the 40th by its match, and two can be brought up."""
    target = 37
    net = inference_model(position_scheme="order")

    def found(self: BlockSearch, tail: Tensor, first: int, last: int) -> Tensor:
        blocks = torch.arange(first, last)
        return torch.where(blocks == target, -39.5, -blocks.float())

    monkeypatch.setattr(BlockSearch, "scores", found)
    session, scores = session_with(
        net, lambda lods, starts: ((starts // BLOCK == target) & (lods <= 1)).float(), 500, search=2
    )
    lods, starts = session.working_context()
    assert ((starts // BLOCK == target) & (lods == 0)).sum() == BLOCK
    # The shortlist is rescored in parts, the rows of one call: as many blocks as a training history
    # has, in order, then the most recent tokens.
    _, lods, starts, _ = scores.seen[0]
    at_a_time = int((lods[0] == 1).sum())
    assert 0.9 * net.mc.geometry.head_nodes[1] < at_a_time <= net.mc.geometry.head_nodes[1]
    assert len(lods) > 1
    for part in range(len(lods)):
        assert lods[part].tolist() == [1] * at_a_time + [0] * (lods.size(1) - at_a_time)
        assert starts[part, :at_a_time].tolist() == [
            BLOCK * block for block in range(part * at_a_time, (part + 1) * at_a_time)
        ]
        recent = starts[part, at_a_time:].tolist()
        assert recent == list(range(recent[0], 499))
        assert recent[0] % BLOCK == 0
        assert BUDGET - HORIZON - 2 * BLOCK < lods.size(1) <= BUDGET - HORIZON


@pytest.mark.parametrize("scheme", ["span", "order"])
@pytest.mark.parametrize("blind", [False, True])
def test_scores_do_not_depend_on_how_many_parts_share_a_call(
    monkeypatch: pytest.MonkeyPatch, scheme: str, blind: bool
) -> None:
    net, found, calls = inference_model(position_scheme=scheme), [], []
    for largest in (1, 9000, candidates.LARGEST_CALL):
        monkeypatch.setattr(candidates, "LARGEST_CALL", largest)
        session = net.session("blind" if blind else "lens", BUDGET, search=3)
        session.ingest(history(470))
        before = net.controller.inference_calls
        session.refocus()
        found.append(rescored_by(session))
        calls.append(net.controller.inference_calls - before)
    assert calls[0] > calls[1] > calls[2]
    assert np.isfinite(found[0]).sum() > 2 * net.mc.geometry.head_nodes[1]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-6)


def test_a_rescored_block_keeps_its_score_in_a_context_where_lensnet_is_blind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Among coarse nodes LensNet says nothing: a found block is opened for what it said among
    gists, and stays open in a saved session too.

    A block among the recent tokens, which all parts show, is rescored as well; coarse nodes are not
    expanded, however LensNet likes them.
    """
    net = inference_model(position_scheme="order")
    monkeypatch.setattr(
        BlockSearch, "scores", lambda self, tail, first, last: -torch.arange(first, last).float()
    )
    for target in (37, 118):

        def score(lods: Tensor, starts: Tensor, target: int = target) -> Tensor:
            return torch.where(
                (lods > 1).any(), (lods > 1).float(), (starts // BLOCK == target).float()
            )

        session, _ = session_with(net, score, 500, search=3)

        def is_open(session: Session, target: int = target) -> bool:
            lods, starts = session.working_context()
            return int(((starts // BLOCK == target) & (lods == 0)).sum()) == BLOCK

        assert is_open(session)
        for _ in session.stream(9):
            assert is_open(session)
        session.save(tmp_path / str(target))
        again = net.load_session(tmp_path / str(target))
        np.testing.assert_array_equal(rescored_by(again), rescored_by(session))
        assert rescored_by(session)[target] == 1
        for _ in again.stream(9):
            assert is_open(again)


def test_while_generating_another_block_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score from the question keeps its block open; it does not keep out what search and LensNet
    want later.
    """
    net, wanted = inference_model(position_scheme="order"), [37]

    def found(self: BlockSearch, tail: Tensor, first: int, last: int) -> Tensor:
        return -(torch.arange(first, last) - wanted[0]).abs().float()

    monkeypatch.setattr(BlockSearch, "scores", found)

    def score(lods: Tensor, starts: Tensor) -> Tensor:
        return ((starts // BLOCK == wanted[0]) & (lods <= 1)).float()

    session, _ = session_with(net, score, 500, search=6, budget=100)

    def is_open(block: int) -> bool:
        lods, starts = session.working_context()
        return int(((starts // BLOCK == block) & (lods == 0)).sum()) == BLOCK

    for count, _ in enumerate(session.stream(40)):
        assert is_open(37)
        if count == 8:
            wanted[0] = 60
    assert is_open(60)


def test_without_a_search_focus_starts_from_the_even_cover() -> None:
    net = inference_model()
    session, scores = session_with(
        net, lambda lods, starts: torch.zeros(lods.shape), 300, search=False
    )
    session.working_context()
    assert session.reader.context is not None
    window = session.reader.context.window
    assert window.geometry is not None
    even = even_blocks(1, window.geometry, window.length, torch.device("cpu"))
    assert not torch.equal(
        even, uniform_blocks(1, window.geometry, window.length, torch.device("cpu"))
    )
    lods, starts = plan_of_blocks(even, window.geometry, window.length)
    _, seen_lods, seen_starts, _ = scores.seen[0]
    assert torch.equal(seen_lods, lods[:, : window.visible])
    assert torch.equal(seen_starts - window.first, starts[:, : window.visible])


def test_far_gists_are_rescored_at_a_distance_that_lensnet_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where positions are those of the tokens, the blocks of a part stand directly before the
    recent tokens.
    """
    net = inference_model(position_scheme="span")
    monkeypatch.setattr(
        BlockSearch, "scores", lambda self, tail, first, last: -torch.arange(first, last).float()
    )
    session, scores = session_with(net, lambda lods, starts: torch.zeros(lods.shape), 500, search=3)
    session.working_context()
    _, lods, starts, _ = scores.seen[0]
    gists = int((lods[0] == 1).sum())
    assert starts[0].tolist() == [
        *range(int(starts[0, gists]) - gists * BLOCK, int(starts[0, gists]), BLOCK),
        *starts[0, gists:].tolist(),
    ]
    assert int(starts[0, gists]) - gists * BLOCK > BLOCK  # they come from the beginning


def test_candidates_start_within_the_budget_and_leave_room_to_open_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first context that LensNet sees has the candidates at LOD1, no coarser node of theirs,
    and at most the budget.
    """
    net = inference_model(position_scheme="order")
    wanted = [20, 55]  # half of the 4 units that the budget has to spare

    def found(self: BlockSearch, tail: Tensor, first: int, last: int) -> Tensor:
        return torch.tensor([float(block in wanted) for block in range(first, last)])

    monkeypatch.setattr(BlockSearch, "scores", found)
    worth = torch.zeros(125).index_fill(0, torch.tensor(wanted), 1.0)
    session, scores = session_with(net, lambda lods, starts: worth[starts // BLOCK], 500, search=5)
    session.working_context()
    lods, starts = next(
        (lods, starts) for _, lods, starts, _ in scores.seen if (lods > 1).any()
    )  # after the shortlist
    assert lods.size(1) <= BUDGET - HORIZON
    for block in wanted:
        assert int(lods[0][(starts[0] <= block * BLOCK).nonzero().max()]) <= 1


def test_by_default_only_histories_beyond_the_trained_length_are_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = inference_model()
    searched = []
    original = BlockSearch.scores

    def counted(self: BlockSearch, tail: Tensor, first: int, last: int) -> Tensor:
        searched.append(last)
        return original(self, tail, first, last)

    monkeypatch.setattr(BlockSearch, "scores", counted)
    for length, budget, search, expected in (
        (96, 30, None, 0),
        (97, 30, None, 1),
        (97, BUDGET, None, 0),  # no block is hidden
        (80, 28, True, 1),
        (300, BUDGET, False, 0),
        (300, BUDGET, None, 1),
        (900, BUDGET, None, 0),  # no room for candidates
    ):
        searched.clear()
        session_with(
            net, lambda lods, starts: torch.zeros(lods.shape), length, budget=budget, search=search
        )[0].working_context()
        assert len(searched) == expected, (length, budget, search)


def test_following_edits_keep_the_prefix_where_that_costs_little() -> None:
    """Noise as scores: without an edit penalty edits fall anywhere, with it near the end; a plain
    difference of scores still wins.
    """

    def first_edits(keep_prefix: float, scale: float) -> float:
        net = inference_model()
        generator = torch.Generator().manual_seed(0)
        session, _ = session_with(
            net,
            lambda lods, starts: scale * torch.rand(lods.shape, generator=generator),
            300,
            keep_prefix=keep_prefix,
            search=False,
        )
        places, before = [], session.working_context()
        for _ in session.stream(40):
            after = session.working_context()
            size = min(len(before[0]), len(after[0]))
            differ = (before[0][:size] != after[0][:size]) | (before[1][:size] != after[1][:size])
            if differ.any():
                places.append(int(differ.argmax()))
            before = after
        assert len(places) == 39 // BLOCK
        return float(np.mean(places))

    free, held = first_edits(0.0, 0.1), first_edits(1.0, 0.1)
    assert held > free + 10
    assert first_edits(1.0, 100.0) == first_edits(0.0, 100.0)


def test_replacement_tails_are_read_in_the_place_of_the_visible_one() -> None:
    net, length = inference_model(), 300
    tokens = history(length)
    assert net.lensnet is not None
    size = net.lensnet.tail_len
    given = history(20, seed=5)

    def tail(policy: str, stand_in: list[int] | None) -> tuple[Tensor, Tensor, Tensor]:
        session, scores = session_with(
            net,
            lambda lods, starts: torch.zeros(lods.shape),
            length,
            policy=policy,
            tail=stand_in,
            search=False,
        )
        session.working_context()
        entries, lods, starts, index = scores.seen[0]
        assert lods[0, -size:].tolist() == [0] * size
        assert starts[0, -1] == length - 2
        return entries[0, -size:], index[0, -size:], entries[0, :-size]

    def expected(ids: list[int]) -> tuple[Tensor, Tensor]:
        embedded = net.nets.embed(torch.tensor(ids))
        return embedded, net.nets.token_index(embedded)

    own, middle, other = tail("lens", None), tail("blind", None), tail("lens", given)
    middle_end = (length - 1) // 2
    for got, ids in (
        (own, tokens[-1 - size : -1]),
        (middle, tokens[middle_end - size : middle_end]),
        (other, given[-size:]),
    ):
        torch.testing.assert_close(got[:2], expected(ids))
        assert torch.equal(got[2], own[2])
    assert torch.equal(tail("blind", given)[0], other[0])
