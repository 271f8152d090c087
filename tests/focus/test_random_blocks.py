"""Variants of tokens alone: what the allocator draws, how LensNet learns from them and chooses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mc_ds.config import FocusConfig, MCConfig, RetrievalConfig
from mc_ds.evaluation.batches import BatchView
from mc_ds.focus.controller import MCController
from mc_ds.focus.opening import with_neighbours
from mc_ds.focus.policies import POLICIES
from mc_ds.geometry import lod1_cover
from mc_ds.inference import InferenceModel
from mc_ds.inference.reading.contexts import HistoryView
from mc_ds.inference.reading.window import block_window
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import NodeTable
from mc_ds.preference import preference_loss
from mc_ds.preference.decisions import decide_blocks
from tests.support.factories import allocator, mc_config, model, plan, run_config, tokens, wake
from tests.support.sessions import TRAINED, batch_view, history, inference_model, read_by_batches

K, TAIL, W = 4, 12, 48


def blocks_config(**changes: Any) -> MCConfig:
    return mc_config(**{"random_blocks": 3, "max_lod": 1, **changes})


@contextmanager
def view_of(net: InferenceModel, mc: MCConfig, ids: torch.Tensor) -> Iterator[BatchView]:
    """What a policy may read of the sequences `ids`, within inference."""
    controller = MCController(net.lensnet)
    with controller.inference(), torch.no_grad():
        nodes = net.model(ids)
        assert isinstance(nodes, NodeTable)
        yield batch_view(net, mc, controller, ids, nodes, [(0, n + 1) for n in range(len(ids))])


@given(st.integers(1, 6), st.integers(0, 2**31), st.integers(1, 5))
def test_variants_are_the_tail_random_blocks_and_the_latest_tokens(
    chosen: int, index: int, variants: int
) -> None:
    mc = blocks_config(random_blocks=chosen)
    lods, starts = allocator(mc).sample(variants, (0, index))
    assert lods.shape == starts.shape == (variants, W)
    assert not lods.any()
    latest = W - chosen * K
    for row in starts:
        assert (np.diff(row) > 0).all()
        assert row[-latest:].tolist() == list(range(mc.seq_len - latest, mc.seq_len))
        opened = row[:-latest].reshape(chosen, K)
        assert (opened[:, 0] % K == 0).all()
        assert (opened == opened[:, :1] + np.arange(K)).all()
        assert opened[-1, -1] < mc.seq_len - latest
    again = allocator(mc).sample(variants + 1, (0, index))[1]
    assert (again[:variants] == starts).all(), "a variant does not depend on how many there are"


def test_every_distant_block_is_drawn_equally_often() -> None:
    mc = blocks_config()
    drawn = np.concatenate([allocator(mc).sample(8, (0, n))[1][:, : 3 * K : K] for n in range(600)])
    counts = np.bincount(drawn.ravel() // K, minlength=15)
    distant = (mc.seq_len - (W - 3 * K)) // K
    assert len(counts) == distant
    expected = drawn.size / distant
    assert (np.abs(counts - expected) < 6 * expected**0.5).all(), counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(random_blocks=10), "random_blocks = 10 does not fit: contexts of 48 entries hold 9"),
        (dict(lens_pair_baseline=True), "pairs a baseline without random blocks"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        blocks_config(**changes)


def test_a_move_expands_what_it_adds_and_collapses_what_it_leaves_out() -> None:
    mc = blocks_config()
    starts = torch.from_numpy(allocator(mc).sample(3, (0, 5))[1])[None]
    expand, collapse = decide_blocks(starts, mc.geometry)
    held = [{int(s) // K for s in row if s < mc.geometry.head_len} for row in starts[0]]
    for a in range(3):
        for b in range(3):
            for entry in range(expand.size(-1)):
                assert expand[0, a, b, entry] == (entry in held[b] - held[a])
                assert collapse[0, a, b, entry] == (entry in held[a] - held[b])
    torch.testing.assert_close(expand.sum(-1), collapse.sum(-1))


def test_the_loss_raises_scores_of_blocks_that_lowered_the_loss() -> None:
    """One block of every sequence lowers the loss of the variants that hold it."""
    mc = blocks_config(num_random_variants=8)
    lods, starts = plan(mc, 6)
    scores = torch.zeros(6, len(lod1_cover(mc.geometry)[0]), requires_grad=True)
    helps = 7
    row_scores = 2.0 - (starts == helps * K).any(1).float()
    arguments = dict(rows_per_sequence=mc.rows_per_sequence, config=mc)
    result = preference_loss(scores, lods, starts, row_scores, **arguments)
    result.loss.backward()
    assert scores.grad is not None
    gradient = scores.grad.sum(0)
    distant = (mc.seq_len - (W - 3 * K)) // K
    assert gradient[:distant].argmin() == helps
    assert gradient[helps] < 0
    assert not gradient[mc.geometry.head_nodes[1] :].any(), "the tail takes no part"
    with pytest.raises(ValueError, match=r"must be \[R / 9, "):
        preference_loss(scores[:5], lods, starts, row_scores, **arguments)


def test_lensnet_reads_a_gist_of_every_block_whatever_is_measured() -> None:
    mc = blocks_config(lens_matches="words")
    net, lens, ids = model(run_config(mc)), wake(LensNet(mc, dim=32)), tokens(mc, 2)
    found = []
    for first in (2, 9):
        output = net(ids, *plan(mc, 2, first), torch.ones(2, mc.horizon_tokens))
        lods, starts = (x.expand(2, -1) for x in lod1_cover(mc.geometry))
        found.append(lens(output.visible_entries, lods, starts, output.lod0, ids))
    torch.testing.assert_close(*found, atol=0, rtol=0)
    assert found[0].shape == (2, mc.geometry.head_nodes[1] + mc.seq_len - mc.geometry.head_len)
    # Node by node: the gists of the head, then the tokens up to the horizon.
    table, geometry = net(ids), mc.geometry
    gists = table.nodes[:, mc.seq_len : mc.seq_len + geometry.head_nodes[1]]
    seen = table.lod0[:, geometry.head_len : mc.seq_len - mc.horizon_tokens]
    torch.testing.assert_close(output.visible_entries, torch.cat([gists, seen], dim=1))


@pytest.mark.parametrize("matches", [True, False])
@pytest.mark.parametrize("name", ["lens", "random"])
def test_sessions_choose_what_batches_choose(name: str, matches: bool) -> None:
    """Tokens alone, exactly W."""
    net = inference_model(random_blocks=3, max_lod=1, lens_matches="meaning" if matches else "none")
    ids = history(96)
    session = net.session(name, W, seed=(0, 1))
    session.ingest(ids)
    lods, starts = session.working_context()
    known = len(ids)
    window = block_window(known, W, net.mc)
    mc = read_by_batches(net, window.seq_len, W)
    padded = torch.zeros(1, window.seq_len + 1, dtype=torch.int64)
    padded[0, :known] = torch.tensor(ids)
    with view_of(net, mc, padded) as view:
        expected = POLICIES[name].choose(view, W)
    known_entries = W - net.mc.horizon_tokens + 1  # the rest is room for the next tokens
    assert not lods.any()
    assert starts.tolist() == expected.starts[0, :known_entries].tolist()
    assert not expected.lods.any()


def test_oracle_opens_the_asked_blocks_and_then_the_latest_tokens() -> None:
    """Of tokens alone: a model of such contexts has gists that nothing trained."""
    mc = blocks_config()
    net, ids = inference_model(random_blocks=3, max_lod=1), tokens(mc, 2)
    with view_of(net, mc, ids) as view:
        asked = [[(1, 3)], [(2 * K + 1, 3 * K + 1), (5 * K, 5 * K + 2)]]
        given = replace(view, spans=[np.array(spans) for spans in asked])
        plan_ = POLICIES["oracle"].choose(given, W)
    for starts, blocks in zip(plan_.starts.tolist(), ([0], [2, 3, 5]), strict=True):
        latest = range(mc.seq_len - (W - K * len(blocks)), mc.seq_len)
        opened = [block * K + place for block in blocks for place in range(K)]
        assert starts == [*opened, *latest]
    assert not plan_.lods.any()
    assert POLICIES["oracle"].omits(mc)
    assert not POLICIES["oracle"].omits(mc_config())


@pytest.mark.parametrize("blocks", [None, 1, 5, 50])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_lensnet_opens_the_best_of_the_blocks_before_the_latest_tokens(
    blocks: int | None, share: float
) -> None:
    mc = blocks_config(lens_matches="words")
    net = inference_model(random_blocks=3, max_lod=1, lens_matches="words")
    ids = tokens(mc, 1)
    with view_of(net, mc, ids) as view:
        given = replace(view, focus_config=FocusConfig(lens_blocks=blocks, neighbours=share))
        scores, plan_ = given.lens_blocks()[0].tolist(), POLICIES["lens"].choose(given, W)
    # Beside the tail fit nine blocks: three (or `blocks`) by their scores, then the latest.
    chosen = min(9, blocks or 3)
    latest = mc.seq_len - (W - chosen * K)

    def value(block: int) -> float:
        beside = [scores[n] for n in (block - 1, block + 1) if 0 <= n < len(scores)]
        return scores[block] + share * max(beside)

    best = sorted(range(latest // K), key=lambda block: -value(block))[:chosen]
    expected = sorted(block * K + place for block in best for place in range(K))
    assert plan_.starts[0].tolist() == [*expected, *range(latest, mc.seq_len)]


@pytest.mark.parametrize("matches", ["none", "words", "meaning"])
@pytest.mark.parametrize("earlier", [1, 6, 40])
def test_earlier_scores_are_those_of_the_shorter_history(matches: str, earlier: int) -> None:
    """Of sessions and of batches; blocks that were in the tail then have none."""
    net = inference_model(random_blocks=3, max_lod=1, lens_matches=matches)
    ids, mc = history(TRAINED + 1), net.mc
    assert net.lensnet is not None
    session, before = (net.session(policy="lens", budget=W) for _ in range(2))
    session.ingest(ids[: TRAINED + 1 - mc.horizon_tokens])
    before.ingest(ids[: TRAINED + 1 - mc.horizon_tokens - earlier])
    now, then = (
        HistoryView(s.reader.contexts, block_window(len(s), W, mc), None) for s in (session, before)
    )
    batch = torch.tensor([ids])
    with net.controller.inference(), view_of(net, mc, batch) as view:
        by_batches, latest = view.lens_blocks(earlier), view.lens_blocks()
        found, expected = now.lens_blocks(earlier), then.lens_blocks()
        present = now.lens_blocks()
    count = expected.size(1)
    assert not torch.allclose(expected, present[:, :count], rtol=0, atol=1e-3)
    assert found.shape == by_batches.shape == latest.shape
    assert count == found.size(1) - (found == -torch.inf).sum() < found.size(1)
    torch.testing.assert_close(found[:, :count], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_batches, found, rtol=0, atol=1e-5)


def test_the_larger_of_both_scores_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    net, mc = inference_model(random_blocks=3, max_lod=1), blocks_config()
    ids, count = tokens(mc, 1), mc.geometry.head_nodes[1]
    now, then = torch.randn(2, 1, count, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(BatchView, "lens_blocks", lambda _, earlier=0: {0: now, 6: then}[earlier])
    with view_of(net, mc, ids) as view:
        focus = FocusConfig(lens_blocks=50, earlier_tokens=6, neighbours=0.5)
        plan_ = POLICIES["lens"].choose(replace(view, focus_config=focus), W)
    larger = with_neighbours(torch.maximum(now, then), 0.5)[0].tolist()
    best = sorted(range(count), key=lambda block: -larger[block])[:9]
    opened = sorted(block * K + place for block in best for place in range(K))
    assert plan_.starts[0].tolist() == [*opened, *range(mc.seq_len - TAIL, mc.seq_len)]


def test_without_a_head_block_earlier_there_are_no_earlier_scores() -> None:
    net, mc = inference_model(random_blocks=3, max_lod=1), blocks_config()
    ids = tokens(mc, 1)
    with view_of(net, mc, ids) as view:
        most = mc.seq_len - TAIL - K
        assert (view.lens_blocks(most + 1) == -torch.inf).all()
        assert view.lens_blocks(most).isfinite().sum() == 1
    session = net.session(policy="lens", budget=W, focus=FocusConfig(earlier_tokens=10**6))
    session.ingest(history(TRAINED))
    assert len(session.working_context()[0]) == W - mc.horizon_tokens + 1


def test_random_opens_as_many_blocks_as_lensnet_chooses() -> None:
    net, mc = inference_model(random_blocks=3, max_lod=1), blocks_config()
    with view_of(net, mc, tokens(mc, 1)) as view:
        for blocks, opened in ((None, 3), (1, 1), (5, 5), (50, 9)):
            given = replace(view, focus_config=FocusConfig(lens_blocks=blocks, neighbours=0.5))
            starts = POLICIES["random"].choose(given, W).starts[0].tolist()
            latest = range(mc.seq_len - (W - opened * K), mc.seq_len)
            assert starts[opened * K :] == list(latest), blocks
            assert max(starts[: opened * K]) < latest[0]


def test_records_name_the_settings_by_which_blocks_were_chosen() -> None:
    focus = FocusConfig(lens_blocks=5, neighbours=0.5, earlier_tokens=8)
    alone, covers = blocks_config(), mc_config()
    both = {"lens_blocks": 5, "neighbours": 0.5, "earlier_tokens": 8}
    given = {
        name: POLICIES[name].settings(focus, alone)
        for name in ("lens", "blind", "random", "recency", "oracle", "full", "uniform")
    }
    assert given == dict(
        lens=both, blind=both, random={"lens_blocks": 5}, recency={}, oracle={}, full={}, uniform={}
    )
    assert POLICIES["lens"].settings(focus, covers) == {}
    assert POLICIES["lens"].settings(FocusConfig(), alone) == {"lens_blocks": 3}
    bm25 = POLICIES["bm25"].using(RetrievalConfig(share=1.0, neighbours=0.25, query_tokens=4))
    assert bm25.settings(FocusConfig(), covers) == {"share": 1.0, "neighbours": 0.25}
    assert POLICIES["bm25"].settings(focus, alone) == {}
