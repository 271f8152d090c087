"""The root module: equal to a plain language model on tokens, labels after the span, no leak,
and gradients only where they belong.
"""

import copy
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.support.reference_geometry as reference
from mc_ds.geometry import label_positions, node_index
from mc_ds.model.backbone.layers import plain_tables
from mc_ds.model.gather import gather_entries
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import (
    MegaContextModel,
    ModelOutput,
    NodeTable,
    entry_weights,
    horizon_scores,
)
from mc_ds.preference import preference_loss
from tests.support.factories import (
    VOCAB,
    allocator,
    mc_config,
    model,
    plan,
    run_config,
    tokens,
    wake,
)

MC = mc_config()


def ones(mc: Any = MC, sequences: int = 2) -> Tensor:
    return torch.ones(sequences, mc.horizon_tokens)


def window(first: int, last: int, sequences: int) -> tuple[Tensor, Tensor]:
    """The plan of a pure LOD0 context of tokens [first, last)."""
    starts = torch.arange(first, last).expand(sequences, -1)
    return torch.zeros_like(starts), starts


def plain_language_model(net: MegaContextModel, ids: Tensor, first: int = 0) -> Tensor:
    """Next-token loss [B, T] of a decoder that has never heard of working contexts; its first
    token stands at position `first`.
    """
    config = net.backbone.config
    positions = torch.arange(first, first + ids.size(1) - 1, dtype=torch.float64)
    angles = positions[:, None] * config.rope_base ** -(
        torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    )
    cos, sin = angles.cos().float()[None], angles.sin().float()[None]
    x = net.backbone.embedding(ids[:, :-1])
    for block in net.backbone.blocks:
        x = block(x, cos, sin)
    logits = F.linear(net.backbone.norm(x), net.backbone.head.weight)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        ids.size(0), -1
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_pure_lod0_context_is_the_plain_language_model_bit_for_bit(tied: bool) -> None:
    net, ids = model(run_config(MC, backbone=dict(tie_embeddings=tied))), tokens(MC, 2)
    assert torch.equal(
        net(ids, *window(0, 96, 2), ones()).entry_nll, plain_language_model(net, ids)
    )
    recent = net(ids, *window(48, 96, 2), ones()).entry_nll
    assert torch.equal(recent, plain_language_model(net, ids[:, 48:], first=48)), (
        "the recency window keeps its positions"
    )


def test_without_variants_the_model_is_the_plain_language_model() -> None:
    net, ids = model(run_config(mc_config(num_random_variants=0))), tokens(MC, 2)
    assert not any("gist" in name for name, _ in net.named_parameters())
    output = net(ids, *window(0, 96, 2), ones())
    assert torch.equal(output.entry_nll, plain_language_model(net, ids))
    # The loss is a weighted sum, whose last bit may differ from a mean's.
    torch.testing.assert_close(output.loss, plain_language_model(net, ids).mean())
    assert torch.equal(net(ids).nodes, net.backbone.embedding(ids[:, :-1]))


@contextmanager
def inputs_replaced(net: MegaContextModel, ids: Tensor) -> Any:
    """The model reads `ids` but is still asked for the labels of the batch."""
    handle = net.backbone.embedding.register_forward_pre_hook(lambda *_: (ids[:, :-1],))
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def mixed() -> tuple[MegaContextModel, Tensor, Tensor, Tensor]:
    """A model whose gists carry signal, two sequences, and rows that mix three levels."""
    lods, starts = plan(MC, 2)
    assert all({0, 1, 2} == set(row.tolist()) for row in lods.view(2, 4, -1)[:, 1:].flatten(0, 1))
    return model(run_config(MC)), tokens(MC, 2), lods, starts


def targets(lods: Tensor, starts: Tensor) -> Tensor:
    rows = zip(lods.tolist(), starts.tolist(), strict=True)
    return torch.tensor(
        [
            [reference.label(entry, MC.block_size) for entry in zip(*row, strict=True)]
            for row in rows
        ]
    )


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_a_loss_depends_on_every_token_before_its_target_and_on_no_other(
    mixed: tuple[MegaContextModel, Tensor, Tensor, Tensor],
) -> None:
    """Every input token of every row is changed in turn; an entry reads the tokens that its row
    covers up to the end of its span.
    """
    net, ids, lods, starts = mixed
    net, target = copy.deepcopy(net).double(), targets(lods, starts)
    before = net(ids, lods, starts, ones()).entry_nll
    for at in range(MC.seq_len):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        with inputs_replaced(net, changed):
            difference = (net(ids, lods, starts, ones()).entry_nll - before).abs()
        reads = (target > at) & (starts[:, :1] <= at)
        wrong = (difference > 1e-12) != reads
        assert not wrong.any(), f"token {at} and (row, entry) {wrong.nonzero().tolist()}"


@torch.no_grad()
def test_an_entry_predicts_the_token_after_its_span(
    mixed: tuple[MegaContextModel, Tensor, Tensor, Tensor],
) -> None:
    """Changing one token as a label alone, inputs kept, changes the losses of exactly the
    entries whose span ends before it.
    """
    net, ids, lods, starts = mixed
    target = targets(lods, starts)
    before = net(ids, lods, starts, ones()).entry_nll
    for at in range(MC.seq_len + 1):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        with inputs_replaced(net, ids):
            after = net(changed, lods, starts, ones()).entry_nll
        assert torch.equal(after != before, target == at)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_rows_read_their_own_sequence(
    mixed: tuple[MegaContextModel, Tensor, Tensor, Tensor],
) -> None:
    net, ids, lods, starts = mixed
    net = copy.deepcopy(net).double()
    other = tokens(MC, 2, seed=5)
    other[0] = ids[0]
    before, after = (net(x, lods, starts, ones()) for x in (ids, other))
    torch.testing.assert_close(after.entry_nll[:4], before.entry_nll[:4], atol=1e-12, rtol=0)
    assert ((before.entry_nll[4:] - after.entry_nll[4:]).abs() > 1e-12).all()
    alone = net(ids[1:], lods[4:], starts[4:], ones(sequences=1))
    torch.testing.assert_close(alone.entry_nll, before.entry_nll[4:], atol=1e-12, rtol=0)


def test_gathered_entries_are_the_nodes_of_their_plan(
    mixed: tuple[MegaContextModel, Tensor, Tensor, Tensor],
) -> None:
    net, ids, lods, starts = mixed
    table = {node: row for row, node in enumerate(reference.node_table(MC.geometry))}
    nodes = net(ids).nodes
    visible = net(ids, lods, starts, ones()).visible_entries
    assert visible.shape == (8, MC.train_wc_length - MC.horizon_tokens, 32)
    for row in range(8):
        for entry in range(visible.size(1)):
            node = table[int(lods[row, entry]), int(starts[row, entry])]
            assert torch.equal(visible[row, entry], nodes[row // 4, node])


def test_gather_sends_each_gradient_back_to_its_node() -> None:
    nodes = torch.randn(2, 5, 3, requires_grad=True)
    index = torch.tensor([[0, 4], [4, 2], [1, 1], [3, 0]])
    weight = torch.randn(4, 2, 3)
    (gather_entries(nodes, index) * weight).sum().backward()
    expected = torch.zeros(2, 5, 3)
    for row in range(4):
        for entry in range(2):
            expected[row // 2, index[row, entry]] += weight[row, entry]
    torch.testing.assert_close(nodes.grad, expected)


def test_horizon_scores_are_masked_means_over_the_last_entries() -> None:
    nll = torch.rand(6, 11, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    scores = horizon_scores(nll, mask).tolist()
    for row in range(3):
        assert scores[row] == pytest.approx(float(nll[row, 8] + 3 * nll[row, 10]) / 4)
    assert scores[3:] == [0.0] * 3, "an empty mask scores nothing"
    torch.testing.assert_close(horizon_scores(nll, torch.ones(2, 3)), nll[:, 8:].mean(1))
    torch.testing.assert_close(horizon_scores(nll, torch.full((2, 3), 0.1)), nll[:, 8:].mean(1))


def test_weights_of_entries_are_those_of_the_loss_for_masks_of_any_size() -> None:
    """Sums of masks below and above 1 and of 0: rows share the weight of the horizon alike."""
    nll = torch.rand(6, 11, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0.1, 0.0, 0.3], [0.0, 0.0, 0.0], [5.0, 1.0, 2.0]])
    weights = entry_weights(nll.shape, mask, 0.7)
    expected = nll.mean() + 0.7 * horizon_scores(nll, mask).mean()
    torch.testing.assert_close((weights * nll).sum(), expected)
    torch.testing.assert_close(weights[:4].sum(), torch.tensor(4 / 6 + 0.7 * 2 / 6))


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_is_the_mean_over_entries_and_the_weighted_horizon(weight: float) -> None:
    mc = mc_config(horizon_loss_weight=weight)
    net, (lods, starts) = model(run_config(mc)), plan(mc, 2)
    mask = torch.tensor([[0.0, 1, 1, 0, 1], [1, 0, 0, 0, 0]])
    output = net(tokens(mc, 2), lods, starts, mask)
    assert isinstance(output, ModelOutput)
    torch.testing.assert_close(output.row_scores, horizon_scores(output.entry_nll, mask))
    torch.testing.assert_close(
        output.loss.detach(), output.entry_nll.mean() + weight * output.row_scores.mean()
    )
    assert not any(part.requires_grad for part in output[1:]), "all but the loss are detached"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_gradient_is_that_of_the_whole_loss(weight: float) -> None:
    """Along the gradient the loss rises by its square norm, the horizon's part included, which
    weighs much more here.
    """
    mc = mc_config(horizon_loss_weight=100 * weight)
    net, ids, (lods, starts) = model(run_config(mc)).double(), tokens(mc, 2), plan(mc, 2)
    mask = torch.tensor([[0.0, 1, 1, 0, 1], [1, 0, 0, 0, 0]])
    net(ids, lods, starts, mask).loss.backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    found, step = [], 1e-5
    with torch.no_grad():
        for way in (step, -2 * step):
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter += way * gradient / norm
            found.append(net(ids, lods, starts, mask).loss)
    torch.testing.assert_close((found[0] - found[1]) / (2 * step), norm, rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_most_likely_tokens_of_the_horizon_are_told_in_evaluation_alone(
    mixed: tuple[MegaContextModel, Tensor, Tensor, Tensor],
) -> None:
    net, ids, lods, starts = mixed
    assert net.training
    assert net(ids, lods, starts).horizon_likeliest.shape == (0, MC.horizon_tokens)
    net = copy.deepcopy(net).eval()
    entries = gather_entries(net(ids).nodes, node_index(lods, starts, MC.geometry))
    logits = net.backbone.head.logits(net.backbone.hidden(entries, *net._tables(lods, starts)))
    expected = logits.argmax(-1)[:, -MC.horizon_tokens :]
    assert torch.equal(net(ids, lods, starts).horizon_likeliest, expected)


def test_gradients_reach_gistnet_through_a_frozen_embedding_in_training_alone() -> None:
    net, ids = model(run_config(MC, backbone=dict(tie_embeddings=False))), tokens(MC, 1)
    net.backbone.embedding.weight.requires_grad_(False)
    seen: list[bool] = []
    net.gistnet.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    net(ids)
    with torch.no_grad():
        net(ids)
    net.eval()(ids)
    assert seen == [True, False, False]


def test_only_training_runs_the_replacement_of_its_computation() -> None:
    net, ids, (lods, starts) = model(run_config()), tokens(MC, 2), plan(MC, 2)
    calls: list[Any] = []
    net.graphed = lambda *inputs: calls.append(inputs) or net.micro_step(*inputs)
    expected = net.micro_step(ids, lods, starts, ones())

    def replaced() -> bool:
        calls.clear()
        assert torch.equal(net(ids, lods, starts, ones()).loss, expected.loss)
        return bool(calls)

    assert replaced()
    assert all(torch.equal(*x) for x in zip(calls[0], (ids, lods, starts, ones()), strict=True))
    with torch.no_grad():
        assert not replaced(), "no gradient: nothing is trained"
    net.eval()
    assert not replaced()


def test_the_model_has_the_settings_of_its_run() -> None:
    config = run_config(loss_chunk_entries=7)
    assert MegaContextModel(config, vocab_size=VOCAB).backbone.head.chunk_entries == 7


def test_losses_and_gradients_are_computed_without_the_host() -> None:
    """Tensors without data fail where anything is read on the host, or made on another device."""
    net = model(run_config()).to("meta")
    ids, lods, starts = (x.to("meta") for x in (tokens(MC, 2), *plan(MC, 2)))
    output = net(ids, lods, starts)
    output.loss.backward()
    assert all(part.is_meta for part in output)
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.eval()(ids, attended_by=5).mass.shape == (2, MC.seq_len + 1)


def test_the_horizon_has_the_same_targets_in_every_row(
    mixed: tuple[MegaContextModel, Tensor, Tensor, Tensor],
) -> None:
    _, _, lods, starts = mixed
    assert (
        targets(lods, starts)[:, -MC.horizon_tokens :] == torch.arange(97 - MC.horizon_tokens, 97)
    ).all()


def test_half_a_plan_is_a_mistake_of_ours(
    mixed: tuple[MegaContextModel, Tensor, Tensor, Tensor],
) -> None:
    net, ids, lods, starts = mixed
    for half in ((lods, None), (None, starts)):
        with pytest.raises(AssertionError, match=r"^a plan is lods and starts together$"):
            net(ids, *half)


def test_tokens_alone_give_the_detached_node_table(
    mixed: tuple[MegaContextModel, Tensor, Tensor, Tensor],
) -> None:
    net, ids, _, _ = mixed
    table = net(ids)
    assert isinstance(table, NodeTable)
    assert not table.nodes.requires_grad
    assert not table.lod0.requires_grad
    assert torch.equal(table.lod0, net.backbone.embedding(ids[:, :96]))
    assert torch.equal(table.nodes, net.gistnet(table.lod0))
    assert torch.equal(net(ids[:, :96]).nodes, table.nodes), "the last token is only a label"


def silent(module: torch.nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]


@pytest.mark.parametrize(
    "options",
    [{}, dict(lens_index=False), dict(lens_ask="none"), dict(lens_ask="untied")],
    ids=str,
)
def test_each_loss_reaches_its_own_parameters_and_no_other(options: dict[str, Any]) -> None:
    mc = mc_config(**options)
    net, lens = model(run_config(mc)), wake(LensNet(mc, dim=32))
    lods, starts = plan(mc, 2)
    output = net(tokens(mc, 2), lods, starts, ones())
    output.loss.backward(retain_graph=True)
    assert silent(net) == [], "the next-token loss trains backbone and GistNet"
    assert all(parameter.grad is None for parameter in lens.parameters()), "and not LensNet"

    before = [parameter.grad.clone() for parameter in net.parameters()]
    scores = lens(output.visible_entries, lods, starts, output.lod0, tokens(mc, 2))
    preference_loss(
        scores, lods, starts, output.row_scores, rows_per_sequence=4, config=mc
    ).loss.backward()
    assert silent(lens) == [], "LensNet learns from its own loss"
    assert all(
        torch.equal(x, parameter.grad)
        for x, parameter in zip(before, net.parameters(), strict=True)
    ), "and nobody else does"


def test_a_sequence_too_short_for_the_coarsest_level_trains() -> None:
    """T = 15 < K^2: level 2 exists in the configuration and has no node."""
    mc = mc_config(
        seq_len=15, train_wc_length=12, recent_tokens=3, horizon_tokens=2, num_random_variants=2
    )
    net, (lods, starts) = model(run_config(mc)), plan(mc, 2)
    net(tokens(mc, 2), lods, starts, torch.ones(2, 2)).loss.backward()
    assert allocator(mc).geometry.node_counts == (15, 3, 0)
    assert net.gistnet is not None
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in net.parameters()
    )


@torch.no_grad()
def test_by_order_the_decoder_reads_a_context_as_a_text_of_its_length() -> None:
    """Losses of a plan with gists equal those of its entries at plain positions 0..W-1, which
    `span` does not give.
    """
    for scheme in ("order", "span"):
        config = run_config(mc_config(position_scheme=scheme))
        mc, root = config.mc, model(config).eval()
        ids, (lods, starts) = tokens(mc, 2), plan(mc, 2)
        nodes = root(ids).nodes
        entries = gather_entries(nodes, node_index(lods, starts, mc.geometry))
        labels = ids.gather(1, label_positions(lods, starts, mc.block_size).view(2, -1)).view(
            lods.shape
        )
        cos, sin = plain_tables(
            lods.size(1), config.backbone.head_dim, config.backbone.rope_base, ids.device
        )
        expected = root.backbone.losses(entries, cos, sin, labels).nll
        same = torch.allclose(root(ids, lods, starts).entry_nll, expected, atol=1e-5)
        assert same == (scheme == "order")
