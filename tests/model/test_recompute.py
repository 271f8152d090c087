"""Activation checkpointing: which blocks are recomputed, and that nothing else changes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mc_ds.model.backbone import recompute
from mc_ds.model.backbone.layers import TransformerBlock, plain_tables
from mc_ds.model.backbone.recompute import recomputed_blocks
from mc_ds.model.megacontext import MegaContextModel
from tests.support.factories import VOCAB, mc_config, model, plan, run_config, tokens

SHARES = [0.0, 0.3, 0.5, 1.0]
BLOCKS = {"backbone": 5, "gistnet": 3}
MC = mc_config(gist_layers=BLOCKS["gistnet"])
CALLS = {"backbone": 1, "gistnet": MC.max_lod}
"""Calls of each block in a forward pass: GistNet's blocks run once per level."""

counts = st.integers(1, 100)
shares = st.floats(0, 1)


@given(counts, shares)
def test_the_nearest_number_of_blocks_to_the_share_is_recomputed(count: int, share: float) -> None:
    recomputed = recomputed_blocks(count, share)
    assert len(recomputed) == count
    assert abs(sum(recomputed) - share * count) <= 0.5


@given(counts, st.data())
def test_a_share_that_is_a_number_of_blocks_is_met_exactly(count: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, count))
    assert sum(recomputed_blocks(count, number / count)) == number


@given(counts, shares, shares)
def test_a_larger_share_recomputes_no_fewer_blocks(count: int, one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert sum(recomputed_blocks(count, less)) <= sum(recomputed_blocks(count, more))


@given(counts, shares, st.data())
def test_recomputed_blocks_are_spread_evenly(count: int, share: float, data: st.DataObject) -> None:
    """Any two runs of blocks of equal length have equally many of them, or one more."""
    recomputed = recomputed_blocks(count, share)
    length = data.draw(st.integers(1, count))
    numbers = {sum(recomputed[i : i + length]) for i in range(count - length + 1)}
    assert max(numbers) - min(numbers) <= 1


@given(counts, shares)
def test_the_last_block_is_kept_if_any_is(count: int, share: float) -> None:
    recomputed = recomputed_blocks(count, share)
    assert recomputed[-1] == all(recomputed)


def test_which_blocks() -> None:
    assert recomputed_blocks(4, 0.5) == [True, False, True, False]
    assert recomputed_blocks(4, 0.75) == [True, True, True, False]
    assert recomputed_blocks(4, 0.25) == [True, False, False, False]
    assert sum(recomputed_blocks(10, 0.1)) == 1


def network(share: float | bool) -> MegaContextModel:
    backbone = dict(num_layers=BLOCKS["backbone"])
    return model(run_config(MC, backbone=backbone, activation_checkpointing=share))


def decoder_loss(net: MegaContextModel) -> Tensor:
    ids, backbone = tokens(MC, 2), net.backbone
    cos, sin = plain_tables(MC.seq_len, backbone.config.head_dim, 1e4, ids.device)
    return backbone.losses(backbone.embedding(ids[:, :-1]), cos, sin, ids[:, 1:]).nll.mean()


def gist_loss(net: MegaContextModel) -> Tensor:
    assert net.gistnet is not None
    nodes = torch.randn(2, MC.seq_len, 32, generator=torch.Generator().manual_seed(3))
    return net.gistnet(nodes).square().mean()


def model_loss(net: MegaContextModel) -> Tensor:
    return net(tokens(MC, 2), *plan(MC, 2)).loss


def calls_of_blocks(net: nn.Module) -> dict[str, int]:
    """Calls of each transformer block, by name, which are counted from now on."""
    calls: dict[str, int] = {}
    for name, module in net.named_modules():
        if isinstance(module, TransformerBlock):

            def count(*_: object, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1

            module.register_forward_pre_hook(count)
    return calls


def expected_calls(parts: list[str], share: float) -> dict[str, int]:
    return {
        f"{part}.blocks.{i}": (1 + again) * CALLS[part]
        for part in parts
        for i, again in enumerate(recomputed_blocks(BLOCKS[part], share))
    }


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    ("loss_of", "parts"),
    [
        (decoder_loss, ["backbone"]),
        (gist_loss, ["gistnet"]),
        (model_loss, ["backbone", "gistnet"]),
    ],
)
def test_gradients_are_those_of_no_recomputation_and_the_share_of_blocks_runs_twice(
    loss_of: Callable[[MegaContextModel], Tensor], parts: list[str], share: float
) -> None:
    plain, frugal = network(0.0), network(share)
    calls = calls_of_blocks(frugal)
    losses = [loss_of(net) for net in (plain, frugal)]
    assert torch.equal(*losses)
    assert calls == expected_calls(parts, 0.0)
    for loss in losses:
        loss.backward()
    assert calls == expected_calls(parts, share)
    learning = 0
    for (name, mine), theirs in zip(frugal.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            learning += 1
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-7, rtol=1e-5)
    assert learning > len(calls)


def test_without_gradients_nothing_is_prepared_for_a_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("checkpointed")

    monkeypatch.setattr(recompute, "checkpoint", refuse)
    net = network(1.0)
    with torch.no_grad():
        model_loss(net)
    with pytest.raises(AssertionError, match="checkpointed"):
        model_loss(net)


@pytest.mark.parametrize("setting", [False, True, 0.5])
def test_decoder_and_gistnet_have_the_share_of_their_run(setting: float | bool) -> None:
    net = MegaContextModel(run_config(activation_checkpointing=setting), vocab_size=VOCAB)
    assert net.gistnet is not None
    shares = (net.backbone.activation_checkpointing, net.gistnet.activation_checkpointing)
    assert shares == (float(setting),) * 2
