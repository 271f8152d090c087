"""GistNet: the node table, what a gist may depend on, and its scale at initialisation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mc_ds.model.backbone.layers import plain_tables
from mc_ds.model.gistnet import GistNet
from mc_ds.model.lensnet import LensNet
from tests.support.factories import wake

K = 4


def gistnet(*, awake: bool = True, **changes: Any) -> GistNet:
    torch.manual_seed(0)
    options = dict(dim=24, block_size=K, max_lod=2, num_layers=2, width=24, num_heads=2, std=0.2)
    net = GistNet(**{**options, **changes})
    return wake(net) if awake else net


def nodes(batch: int = 2, count: int = 39, dim: int = 24) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("width", "num_heads"), [(24, 2), (16, 2), (48, 1)])
def test_the_table_holds_tokens_then_their_gists_then_gists_of_gists(
    width: int, num_heads: int
) -> None:
    """39 tokens: 9 whole blocks and 3 tokens over, 2 whole spans and 1 block over."""
    net, tokens = gistnet(width=width, num_heads=num_heads), nodes()
    table = net(tokens)
    assert table.shape == (2, 39 + 9 + 2, 24)
    assert torch.equal(table[:, :39], tokens)
    for block in range(9):
        alone = net.gists(tokens[:, K * block : K * block + K], 1)
        torch.testing.assert_close(table[:, 39 + block], alone[:, 0], atol=1e-5, rtol=1e-5)
    for span in range(2):
        alone = net.gists(table[:, 39 + K * span : 39 + K * span + K], 2)
        torch.testing.assert_close(table[:, 48 + span], alone[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("token", range(39))
def test_a_token_reaches_only_its_own_gists(token: int) -> None:
    net, tokens = gistnet(), nodes()
    changed = tokens.clone()
    changed[0, token] += 1
    moved = ((net(tokens) - net(changed)).abs().amax(-1) > 1e-6).nonzero().tolist()
    expected = [[0, token]]
    if token < 36:
        expected.append([0, 39 + token // K])
    if token < 32:
        expected.append([0, 48 + token // K**2])
    assert moved == expected


def test_every_child_sees_every_other() -> None:
    net = gistnet()
    cos, sin = plain_tables(K, net.head_dim, net.ROPE_BASE, torch.device("cpu"))
    x = nodes(1, K)
    for child in range(K):
        changed = x.clone()
        changed[0, child] += 1
        assert (
            (net.blocks[0](x, cos, sin) - net.blocks[0](changed, cos, sin)).abs().amax(-1) > 1e-5
        ).all()


def test_a_gist_knows_the_order_of_its_children_and_its_level() -> None:
    net, block = gistnet(), nodes(1, K)
    gist = net.gists(block, 1)
    assert (gist - net.gists(block.flip(1), 1)).abs().max() > 1e-3
    assert (gist - net.gists(block, 2)).abs().max() > 1e-3


def test_gists_of_permuted_blocks_are_permuted_gists() -> None:
    net, tokens = gistnet(), nodes(1, 32)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    shuffled = tokens.view(1, 8, K, 24)[:, order].flatten(1, 2)
    torch.testing.assert_close(
        net.gists(shuffled, 1), net.gists(tokens, 1)[:, order], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_gists_start_with_the_size_of_a_token_embedding(block_size: int, std: float) -> None:
    """Not with 1/sqrt(K) of it, which a mean of independent vectors has; at both levels."""
    net = gistnet(awake=False, block_size=block_size, dim=64, std=0.02)
    tokens = std * nodes(2, block_size**2 * 8, 64)
    levels = net(tokens).split([tokens.size(1), tokens.size(1) // block_size, 8], dim=1)
    for level in levels[1:]:
        assert level.square().mean().sqrt().item() == pytest.approx(std, rel=0.1)


def test_positions_turn_at_the_speeds_that_trained_weights_know() -> None:
    assert GistNet.ROPE_BASE == LensNet.ROPE_BASE == 10_000


@torch.no_grad()
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_gist_is_the_grown_mean_of_its_children_and_what_is_learnt_of_them(level: int) -> None:
    """Written out for a GistNet whose blocks have been taken away."""
    net, children = gistnet(max_lod=3, width=16, num_heads=1), nodes(2, K)
    net.blocks = torch.nn.ModuleList()
    net.residual_gain.uniform_(1, 3)
    net.pool_norm.weight.uniform_(0.5, 1.5)
    pooled = (children @ net.project.weight.T + net.level_embedding[level - 1]).mean(1)
    eps = torch.finfo(torch.float32).eps
    normed = pooled / (pooled.square().mean(-1, keepdim=True) + eps).sqrt() * net.pool_norm.weight
    hidden = torch.nn.functional.gelu(normed @ net.head_up.weight.T)
    expected = net.residual_gain[level - 1] * children.mean(1) + hidden @ net.head_down.weight.T
    torch.testing.assert_close(net.gists(children, level)[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_every_level_has_a_mark_of_the_full_width() -> None:
    net = gistnet(max_lod=3, width=16, num_heads=2)
    assert net.level_embedding.shape == (3, 16)
    assert (net.level_embedding != net.level_embedding[0, 0]).flatten()[1:].all()


def test_children_are_projected_only_where_widths_differ_and_keep_their_size() -> None:
    assert not list(gistnet(width=24).project.parameters())
    projected = gistnet(awake=False, dim=1024, width=64).project(nodes(2, 64, 1024))
    assert projected.shape == (2, 64, 64)
    assert projected.square().mean().sqrt().item() == pytest.approx(1, rel=0.1)


def test_a_history_shorter_than_a_span_has_no_coarse_nodes() -> None:
    assert gistnet()(nodes(2, 15)).shape == (2, 15 + 3, 24)
    assert gistnet(max_lod=3)(nodes(2, 70)).shape == (2, 70 + 17 + 4 + 1, 24)


def test_all_parameters_learn_from_every_gist() -> None:
    net = gistnet(width=16)
    for rows in (slice(39, 48), slice(48, 50)):
        net.zero_grad()
        net(nodes())[:, rows].square().sum().backward()
        silent = [
            name
            for name, parameter in net.named_parameters()
            if parameter.grad is None or not parameter.grad.any()
        ]
        assert silent == []
