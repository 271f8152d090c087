"""Lexical matches of a tree's entries: those of training in short histories, and in long ones of
the blocks that are scored.
"""

import pytest
import torch

from mc_ds.focus.controller import MCController
from mc_ds.geometry import Geometry, lod1_cover
from mc_ds.inference import Session
from mc_ds.inference.reading import lens as lens_module
from mc_ds.inference.reading.lens import TreeLens
from mc_ds.model.lensnet.matches import match_features, with_block_before
from mc_ds.model.megacontext import NodeTable
from tests.support.sessions import batch_view, history, inference_model, read_by_batches

K = 4


def read(session: Session) -> TreeLens:
    lens = session.reader.contexts.lens
    assert lens is not None
    return lens


def made(known: int) -> tuple[Session, TreeLens, torch.Tensor]:
    session = inference_model(lens_matches="words", max_lod=1).session("lens", 48)
    ids = history(known)
    session.ingest(ids)
    return session, read(session), torch.tensor([ids])


def matches(session: Session, lods: torch.Tensor, starts: torch.Tensor) -> torch.Tensor | None:
    """The vectors of the entries' matches."""
    net, found = session.reader.networks, read(session).matched(lods, starts, len(session))
    if found is None:
        return None
    assert net.lensnet is not None
    with torch.no_grad():
        features = match_features(found.blocks_mX[None], found.tail_Q[None])
        return net.lensnet.spread_matches(features, lods, found.place_RM)


def embedded(session: Session, features: torch.Tensor) -> torch.Tensor:
    """The vectors that LensNet makes of these features."""
    lensnet = session.reader.networks.lensnet
    assert lensnet is not None
    assert lensnet.matches is not None
    with torch.no_grad():
        vectors: torch.Tensor = lensnet.matches(features)
    return vectors


def test_entries_have_the_matches_of_their_blocks() -> None:
    known = 120
    session, lens, ids = made(known)
    tail_len = lens.tail_len
    geometry = Geometry(known - 1, K, 1, tail_len)
    lods, starts = (x[None] for x in lod1_cover(geometry))
    found = matches(session, lods, starts)
    blocks = with_block_before(ids, K, geometry.head_nodes[1])
    features = match_features(blocks, ids[:, known - 1 - tail_len : known - 1])
    expected = embedded(session, features)
    assert found is not None
    torch.testing.assert_close(found[:, : geometry.head_nodes[1]], expected)
    assert not found[:, geometry.head_nodes[1] :].any(), "the tail has none"


@pytest.mark.parametrize("kind", ["words", "meaning"])
def test_scores_are_those_that_training_code_computes(kind: str) -> None:
    net, ids = inference_model(lens_matches=kind, max_lod=1), history(120)
    session = net.session("lens", 48)
    session.ingest(ids)
    known, horizon = len(ids), net.mc.horizon_tokens
    mc = read_by_batches(net, known - 1 + horizon, 48)
    lods, starts = (x[None] for x in lod1_cover(mc.geometry))
    visible = lods.size(1) - horizon
    padded = torch.tensor([[*ids, *[0] * horizon]])
    controller = session.reader.networks.controller
    with controller.inference(), torch.no_grad():
        found = read(session).scores(lods[:, :visible], starts[:, :visible], known)
        nodes = net.model(padded)
        assert isinstance(nodes, NodeTable)
        view = batch_view(net, mc, MCController(net.lensnet), padded, nodes, [(0,)])
        with view.controller.inference():
            expected = view.lens_scores(lods, starts)[:, :visible]
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_in_a_long_history_only_the_blocks_of_entries_are_matched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = 120
    session, lens, ids = made(known)
    monkeypatch.setattr(lens_module, "MATCHED_BLOCKS", 5)
    chosen = torch.tensor([0, 3, 4, 11, 17, 20])
    tail = torch.arange(known - 1 - lens.tail_len, known - 1)
    starts = torch.cat([chosen * K, tail])[None]
    lods = torch.cat([torch.ones_like(chosen), torch.zeros_like(tail)])[None]
    found = matches(session, lods, starts)
    every = with_block_before(ids, K, int(chosen.max()) + 1)
    features = match_features(every[:, chosen], ids[:, known - 1 - lens.tail_len : known - 1])
    expected = embedded(session, features)
    assert found is not None
    torch.testing.assert_close(found[:, : len(chosen)], expected)
    assert not found[:, len(chosen) :].any()


def test_the_latest_words_decide_and_without_matches_there_are_none() -> None:
    known = 120
    session, lens, ids = made(known)
    lods, starts = (x[None] for x in lod1_cover(Geometry(known - 1, K, 1, lens.tail_len)))
    before = matches(session, lods, starts)
    other = inference_model(lens_matches="words", max_lod=1).session("lens", 48)
    changed = ids[0].clone()
    changed[known - 2] = changed[8]
    other.ingest(changed.tolist())
    after = matches(other, lods, starts)
    assert before is not None
    assert after is not None
    assert ((after - before).abs() > 1e-6).any()
    plain = inference_model(max_lod=1).session("lens", 48)
    plain.ingest(ids[0].tolist())
    assert matches(plain, lods, starts) is None


def test_a_replaced_tail_replaces_the_words_that_are_matched() -> None:
    """`blind` reads the words that end in the middle of the history; a given tail its own."""
    known = 120
    net, ids = inference_model(lens_matches="words", max_lod=1), torch.tensor([history(120)])
    tail_len = read(net.session("lens", 48)).tail_len
    lods, starts = (x[None] for x in lod1_cover(Geometry(known - 1, K, 1, tail_len)))
    given = history(tail_len, seed=5)
    middle = (known - 1) // 2
    expected_tails = {
        "blind": ids[:, middle - tail_len : middle],
        "other_question": torch.tensor([given]),
    }
    blocks = with_block_before(ids, K, int((lods > 0).sum()))
    for session in (net.session("blind", 48), net.session("lens", 48, tail=given)):
        session.ingest(ids[0].tolist())
        policy = "blind" if session.settings.policy == "blind" else "other_question"
        expected = embedded(session, match_features(blocks, expected_tails[policy]))
        found = matches(session, lods, starts)
        assert found is not None
        torch.testing.assert_close(found[:, : blocks.size(1)], expected)
