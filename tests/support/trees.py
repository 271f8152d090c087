"""Small networks, streams and comparisons for the tests of trees."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mc_ds.config import MCConfig
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from tests.support.factories import VOCAB, mc_config, model, run_config, wake

HASHES: dict[str, Any] = dict(gistnet_hash="a" * 64, index_hash="b" * 64)
PIECE_BYTES = 128
"""Of checksums, so that even small trees have whole pieces."""


def networks(**mc: Any) -> tuple[MegaContextModel, LensNet]:
    """A model and its LensNet, K = 4, D = 16, I = 8 by default; zero-initialised parts are
    random.
    """
    config = mc_config(**{**dict(gist_layers=1, lens_dim=8, lens_layers=1), **mc})
    torch.manual_seed(1)
    net = model(
        run_config(
            config, backbone=dict(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=16)
        )
    ).eval()
    return net, wake(LensNet(config, dim=16)).eval()


def tree_nets(**mc: Any) -> TreeNets:
    return TreeNets.of(*networks(**mc))


def stream(first: int, last: int) -> list[int]:
    """Tokens [first, last) of one endless stream, each a function of its position alone."""
    positions = torch.arange(first, last)
    return ((positions * 2_654_435_761 + positions // 7 * 40_503) % 2**32 // 977 % VOCAB).tolist()


def node_table(
    net: MegaContextModel, lens: LensNet, tokens: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Nodes and index vectors of each level, as the whole-sequence networks make them."""
    mc: MCConfig = net.mc
    assert net.gistnet is not None
    with torch.no_grad():
        lod0 = net.backbone.embedding(torch.tensor(tokens, dtype=torch.int64)[None])
        counts = [len(tokens) // mc.block_size**level for level in range(mc.max_lod + 1)]
        nodes = net.gistnet(lod0)[0].split(counts)
        index = (
            lens.index(lod0, block_size=mc.block_size, max_lod=mc.max_lod)[0].split(counts)
            if lens.index is not None
            else []
        )
    return list(nodes), list(index)


def levels(tree: MegaContextTree) -> list[tuple[Tensor, Tensor]]:
    """All gists and index vectors of a tree, by level from 1."""
    everything = [torch.arange(tree.level_len(level)) for level in range(tree.shape.max_lod + 1)]
    return [
        (tree.gists(level, nodes), tree.index(level, nodes))
        for level, nodes in enumerate(everything)
        if level
    ]


def assert_same(tree: MegaContextTree, other: MegaContextTree, *, exact: bool = False) -> None:
    """Equal tokens; equal nodes, bit for bit where `exact`."""
    assert torch.equal(tree.tokens(0, len(tree)), other.tokens(0, len(other)))
    tolerance = dict(atol=0.0, rtol=0.0) if exact else dict(atol=1e-5, rtol=1e-5)
    for mine, its in zip(levels(tree), levels(other), strict=True):
        torch.testing.assert_close(mine, its, **tolerance)
