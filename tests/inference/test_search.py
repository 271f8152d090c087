"""The search gives the logits of LensNet's first ask layer, for every block, however it is sliced
and whatever was searched before.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.inference import InferenceModel, RamTree
from mc_ds.inference.reading import search as search_module
from mc_ds.inference.reading.search import BlockSearch, searchable
from mc_ds.model.lensnet.ask import AskLayer
from tests.support.sessions import history, inference_model


def ask_logits(net: InferenceModel, tree: RamTree, tail: Tensor, first: int, last: int) -> Tensor:
    """By the ask layer itself, from the mass it puts on every tail token: log of mass over the
    sink's.
    """
    assert net.lensnet is not None
    ask = net.lensnet.asks[0]
    assert isinstance(ask, AskLayer)

    def normed(x: Tensor) -> Tensor:
        return F.rms_norm(x, (32,))

    nodes = normed(tree.index(1, torch.arange(first, last)))
    with torch.no_grad():
        keys = normed(ask.key(normed(tail)))
        logits = normed(ask.query(nodes)) * ask.gain[0] @ keys.T / math.sqrt(32)
        return (logits - ask.sink_logit[0]).amax(dim=-1)


def grown(net: InferenceModel, length: int, seed: int = 0) -> RamTree:
    tree = RamTree(net.nets)
    tree.append(history(length, seed))
    return tree


def tail_of(net: InferenceModel, seed: int = 9) -> Tensor:
    return net.nets.token_index(net.nets.embed(torch.tensor(history(7, seed))))


@pytest.mark.parametrize("ask", ["tied", "untied"])
def test_scores_are_the_ask_layers_logits(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = inference_model(lens_ask=ask)
    assert net.lensnet is not None
    with torch.no_grad():
        layer = net.lensnet.asks[0]
        layer.gain.fill_(0.7)  # type: ignore[operator, union-attr]
        layer.sink_logit.fill_(1.0)  # type: ignore[operator, union-attr]
    tree, tail = grown(net, 403), tail_of(net)
    expected = ask_logits(net, tree, tail, 0, 100)
    torch.testing.assert_close(BlockSearch(net.lensnet, tree).scores(tail, 0, 100), expected)
    monkeypatch.setattr(search_module, "SLICE_BYTES", 4 * 32 * 17)
    sliced = BlockSearch(net.lensnet, tree)
    torch.testing.assert_close(sliced.scores(tail, 37, 64), expected[37:64])
    torch.testing.assert_close(sliced.scores(tail, 3, 100), expected[3:])


def test_scores_follow_a_tree_that_grows_and_is_cut() -> None:
    net = inference_model()
    assert net.lensnet is not None
    tree, tail = grown(net, 200), tail_of(net)
    search = BlockSearch(net.lensnet, tree)
    search.scores(tail, 0, 50)
    tree.append(history(120, seed=5))
    torch.testing.assert_close(search.scores(tail, 0, 80), ask_logits(net, tree, tail, 0, 80))
    tree.truncate(130)
    search.forget(130 // 4)
    tree.append(history(120, seed=6))
    torch.testing.assert_close(search.scores(tail, 0, 62), ask_logits(net, tree, tail, 0, 62))


def test_a_block_that_repeats_the_question_is_found() -> None:
    """Even untrained, tied queries and keys see lexical overlap: among 500 blocks of other tokens
    the one that holds asked ones.
    """
    net = inference_model(dim=256, lens_dim=256)
    assert net.lensnet is not None
    tokens = [token % 40 for token in history(2000)]
    tokens[1236:1240] = [50, 51, 52, 53]
    tree = RamTree(net.nets)
    tree.append(tokens)
    tail = net.nets.token_index(net.nets.embed(torch.tensor([41, 42, 50, 51, 43, 44, 52])))
    scores = BlockSearch(net.lensnet, tree).scores(tail, 0, 500)
    assert int(scores.argmax()) == 1236 // 4


def test_it_needs_an_index_and_ask_layers() -> None:
    assert searchable(inference_model().lensnet)
    assert not searchable(inference_model(lens_index=False).lensnet)
    assert not searchable(inference_model(lens_ask="none").lensnet)
    assert not searchable(None)
