"""LensNet: blind to the horizon, non-causal, with additive index vectors and ask layers that
start tied.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tests.support.reference_geometry as reference
from mc_ds.config import MCConfig
from mc_ds.model.lensnet import IndexNet, LensNet
from mc_ds.model.lensnet.ask import AskLayer
from mc_ds.model.lensnet.lensnet import opened_blocks, shared, standing
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.model.positions import rotary_tables
from mc_ds.preference import preference_loss
from tests.support.factories import VOCAB, mc_config, model, plan, run_config, tokens, wake

MC = mc_config()
VISIBLE = MC.train_wc_length - MC.horizon_tokens
TAIL = MC.recent_tokens - MC.horizon_tokens
VARIANTS: list[dict[str, Any]] = [
    {},
    dict(lens_index=False),
    dict(lens_ask="none"),
    dict(lens_ask="untied"),
    dict(lens_ask="none", lens_index=False),
    dict(lens_block_scores="shared"),
    dict(lens_matches="words"),
    dict(lens_matches="meaning"),
]


def lensnet(mc: MCConfig = MC, *, awake: bool = True, dim: int = 32) -> LensNet:
    torch.manual_seed(1)
    net = LensNet(mc, dim=dim)
    return wake(net) if awake else net


@torch.no_grad()
def scores(
    net: MegaContextModel, lens: LensNet, ids: Tensor, lods: Tensor, starts: Tensor
) -> Tensor:
    output = net(ids, lods, starts, torch.ones(len(ids), lens.config.horizon_tokens))
    return lens(output.visible_entries, lods, starts, output.lod0, ids)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_scores_cover_the_visible_entries_and_are_zero_in_the_horizon(
    options: dict[str, Any],
) -> None:
    mc = mc_config(**options)
    net, lens, (lods, starts) = model(run_config(mc)), lensnet(mc), plan(mc, 2)
    found = scores(net, lens, tokens(mc, 2), lods, starts)
    assert found.shape == (8, mc.train_wc_length)
    assert found.dtype == torch.float32
    assert not found[:, VISIBLE:].any()
    assert (found[:, :VISIBLE].abs() > 0).all()
    assert found.abs().max() <= 1
    assert found[:, :VISIBLE].std(dim=1).min() > 1e-3


UNORDERED = {"Gather", "IndexSelect", "IndexAdd", "IndexPut", "Index", "ScatterAdd", "Cumsum"}
"""Operations whose gradient, or sum, a GPU adds up in an order that differs from run to run."""
DIVIDING = {"Amax", "Amin", "ScatterReduce", "MaxBackward1", "MinBackward1", "Maximum", "Minimum"}
"""Operations whose gradient is divided by the number of values that equal the result: see the
docstring of mc_ds.model.lensnet.meaning.
"""


def backward_steps(result: Tensor) -> set[str]:
    """The operations that the gradient of `result` passes; `max` without a dimension, for example,
    as MaxBackward1.
    """
    steps, left, seen = set(), [result.grad_fn], set()
    while left:
        step = left.pop()
        if step is not None and step not in seen:
            seen.add(step)
            steps.add(step.name().removesuffix("Backward0"))
            left += [earlier for earlier, _ in step.next_functions]
    return steps


@pytest.mark.parametrize(
    "options", [*VARIANTS, dict(lens_ask_reach="open"), dict(lens_split_margins=False)], ids=str
)
def test_no_gradient_depends_on_the_order_of_a_gpu_or_on_equal_values(
    options: dict[str, Any],
) -> None:
    mc = mc_config(**options)
    net, lens, (lods, starts) = model(run_config(mc)), lensnet(mc), plan(mc, 2)
    ids = tokens(mc, 2)
    output = net(ids, lods, starts, torch.ones(2, mc.horizon_tokens))
    found = lens(output.visible_entries, lods, starts, output.lod0, ids)
    result = preference_loss(
        found, lods, starts, output.row_scores, rows_per_sequence=mc.rows_per_sequence, config=mc
    )
    steps = backward_steps(result.numerator)
    assert {"Embedding", "Tanh"} <= steps, "the walk has passed LensNet"
    assert not steps & (UNORDERED | DIVIDING)


def test_scores_start_at_zero() -> None:
    net, (lods, starts) = model(run_config()), plan(MC, 2)
    assert not scores(net, lensnet(awake=False), tokens(MC, 2), lods, starts).any()


def test_it_has_learnt_once_any_weight_of_the_output_layer_has_moved() -> None:
    lens = lensnet(awake=False)
    assert lens.has_learnt() is False
    with torch.no_grad():
        lens.head_down.weight[0, 3] = -1e-9
    assert lens.has_learnt() is True


def test_without_an_index_the_embeddings_of_the_tokens_are_not_read() -> None:
    mc = mc_config(lens_index=False)
    lens, (lods, starts) = lensnet(mc), plan(mc, 1)
    entries = torch.randn(4, VISIBLE, 32, generator=torch.Generator().manual_seed(2))
    lod0 = torch.full((1, 96, 32), math.nan)
    assert lens.index is None
    assert lens(entries, lods, starts, lod0).isfinite().all()


@pytest.mark.parametrize(
    "options", [*VARIANTS, dict(lens_ask_reach="open"), dict(position_scheme="order")], ids=str
)
def test_scores_and_gradients_are_computed_without_the_host(options: dict[str, Any]) -> None:
    """Tensors without data fail where anything is read on the host, or made on another device."""
    mc = mc_config(**options)
    lens, (lods, starts) = lensnet(mc).to("meta"), (x.to("meta") for x in plan(mc, 2))
    found = lens(
        torch.empty(8, VISIBLE, 32, device="meta"),
        lods,
        starts,
        torch.empty(2, 96, 32, device="meta"),
        tokens(mc, 2).to("meta"),
    )
    assert found.is_meta
    assert found.shape == (8, mc.train_wc_length)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in lens.parameters())


def test_only_training_runs_the_replacement_of_its_computation() -> None:
    lens, (lods, starts) = lensnet(), plan(MC, 1)
    batch = torch.randn(4, VISIBLE, 32), lods, starts, torch.randn(1, 96, 32)
    plain, calls = lens(*batch), []
    lens.graphed = lambda *inputs: calls.append(inputs) or plain + 1

    def replaced() -> bool:
        calls.clear()
        same = torch.equal(lens(*batch), plain)
        assert same == (not calls)
        return bool(calls)

    assert replaced()
    assert all(found is given for found, given in zip(calls[0], batch, strict=True))
    with torch.no_grad():
        assert not replaced(), "no gradient: nothing is trained"
    lens.eval()
    assert not replaced()
    lens.train()
    lens.graphed = None
    assert torch.equal(lens(*batch), plain)


def test_layers_start_at_the_scale_of_a_linear_layer() -> None:
    """Weights of blocks have the variance 1 / (3 inputs), which `nn.Linear` draws; the mark of
    the tail is small beside them.
    """
    width = 256
    lens = lensnet(mc_config(lens_dim=width, lens_layers=1), awake=False, dim=64)
    block = lens.blocks[0]
    for projection in (block.qkv, block.out, block.gate_up, block.down):
        assert projection.weight.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.02)
    assert lens.tail_embedding.std().item() == pytest.approx(0.02, rel=0.2)
    assert lens.lod_embedding.weight.shape == (MC.max_lod + 1, width)


def test_the_head_and_the_matches_have_no_constant_part() -> None:
    """A constant in all scores or logits has no effect, and weight decay would let it drift."""
    lens = lensnet(mc_config(lens_ask_reach="open", lens_layers=3))
    biases = {name for name, _ in lens.named_parameters() if name.endswith("bias")}
    assert biases == {
        "index.gate.0.bias",
        "index.gate.2.bias",
        "early.0.up.bias",
        "early.1.up.bias",
        "head_up.bias",
    }


def test_an_ask_layer_stores_one_gain_one_sink_and_where_asked_relevance_and_trust() -> None:
    plain = {
        "gain": (1, 1, 1),
        "sink_logit": (1, 1, 1),
        "norm.weight": (8,),
        **{f"{part}.weight": (8, 8) for part in ("query", "key", "value", "out")},
    }
    more = {"relevance.weight": (1, 8), "trust": (1, 1, 1)}
    for options, expected in (({}, plain), ({"relevance": True}, plain | more)):
        layer = AskLayer(dim=8, num_read=5, tied=True, **options)
        assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == expected


@torch.no_grad()
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("reach", ["tail", "open"])
def test_layers_run_in_turn_and_every_ask_layer_is_given_what_it_may_read(
    reach: str, indexed: bool
) -> None:
    """Written out: projected entries with the marks of level, tail and index; the tail for every
    ask layer, or from the second one on all entries with the standing of their blocks by the
    early scores; the sum of all scores squashed.
    """
    mc = mc_config(lens_layers=3, lens_ask_reach=reach, lens_index=indexed)
    lens, (lods, starts) = lensnet(mc), plan(mc, 1)
    lods, starts = lods[:, :VISIBLE], starts[:, :VISIBLE]
    entries, index = torch.randn(
        2, 4, VISIBLE, 32, generator=torch.Generator().manual_seed(9)
    ).unbind()
    white = F.rms_norm(index, (32,)) if indexed else None
    x = F.rms_norm(entries, (32,)) @ lens.project.weight.T + lens.lod_embedding.weight[lods]
    x = x + white if indexed else x
    x[:, -TAIL:] += lens.tail_embedding
    blocks = opened_blocks(lods, starts, VISIBLE - TAIL, mc.block_size)
    cos, sin = rotary_tables(lods, starts, block_size=mc.block_size, head_dim=16, base=1e4)
    early = torch.zeros(4, VISIBLE)
    for layer in range(3):
        if layer and reach == "open":
            early = early + lens.early[layer - 1](x)
            x = lens.asks[layer](x, x, white, white, standing(early, blocks, lods))
        else:
            of_tail = white[:, -TAIL:] if indexed else None
            x = lens.asks[layer](x, x[:, -TAIL:], white, of_tail)
        x = lens.blocks[layer](x, cos, sin)
    head = lens.head_down(F.gelu(lens.head_up(lens.head_norm(x))))[..., 0]
    found = lens.score(entries, lods, starts, index if indexed else None)
    torch.testing.assert_close(found, (early + head).tanh(), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_tokens_of_the_horizon_change_no_score(options: dict[str, Any]) -> None:
    mc = mc_config(**options)
    net, lens, ids = model(run_config(mc)).double(), lensnet(mc).double(), tokens(mc, 2)
    lods, starts = plan(mc, 2)
    first = mc.seq_len - mc.horizon_tokens
    before = scores(net, lens, ids, lods, starts)
    changed = ids.clone()
    changed[:, first:] = (changed[:, first:] + 1) % VOCAB
    torch.testing.assert_close(scores(net, lens, changed, lods, starts), before, atol=1e-12, rtol=0)
    seen = ids.clone()
    seen[:, first - 1] = (seen[:, first - 1] + 1) % VOCAB
    moved = (scores(net, lens, seen, lods, starts) - before).abs()[:, :VISIBLE] > 1e-12
    assert moved.all(), "the last visible token changes all: LensNet is not causal"


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_every_visible_entry_is_read_by_the_first_and_by_the_last() -> None:
    """Without ask layers the blocks alone must carry it, in both directions."""
    mc = mc_config(lens_ask="none", lens_index=False)
    lens, (lods, starts) = lensnet(mc).double(), plan(mc, 1)
    entries = torch.randn(4, VISIBLE, 32, generator=torch.Generator().manual_seed(2)).double()
    lod0 = torch.zeros(1, 96, 32).double()
    ids = tokens(MC, 1)
    before = lens(entries, lods, starts, lod0, ids)
    for at in range(0, VISIBLE, 6):
        changed = entries.clone()
        changed[:, at] += 1
        moved = (lens(changed, lods, starts, lod0, ids) - before).abs() > 1e-12
        assert moved[:, 0].all()
        assert moved[:, VISIBLE - 1].all()


def test_index_vectors_of_tokens_are_gated_projections() -> None:
    torch.manual_seed(0)
    index = wake(IndexNet(dim=32, lens_dim=16))
    x = 0.02 * torch.randn(2, 7, 32)
    normed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    hidden, _, final = index.gate
    assert hidden.weight.shape == (64, 32), "as in stored weights"
    weight = F.gelu(normed @ hidden.weight.T + hidden.bias) @ final.weight.T + final.bias
    gate = torch.log1p(torch.exp(weight))
    torch.testing.assert_close(
        index.token_vectors(x), (normed * gate) @ index.project.weight.T, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("block_size", "max_lod", "count"), [(4, 2, 39), (2, 3, 25), (3, 3, 20), (5, 1, 12)]
)
def test_a_gists_index_vector_is_the_sum_of_its_childrens_at_every_level(
    block_size: int, max_lod: int, count: int
) -> None:
    """Of all tokens under it, hence of its children on every level between."""
    index = wake(IndexNet(dim=8, lens_dim=6))
    lod0 = torch.randn(2, count, 8, generator=torch.Generator().manual_seed(0))
    table, token_vectors = (
        index(lod0, block_size=block_size, max_lod=max_lod),
        index.token_vectors(lod0),
    )
    row = 0
    for level in range(max_lod + 1):
        span = block_size**level
        for first in range(0, count - span + 1, span):
            torch.testing.assert_close(
                table[:, row], token_vectors[:, first : first + span].sum(1), atol=1e-5, rtol=1e-5
            )
            row += 1
    assert table.shape == (2, row, 6)
    assert table.dtype == torch.float32


def crowded(tokens: int) -> Tensor:
    """Embeddings [1, tokens, 24] that share a direction twenty times stronger than what tells
    them apart.
    """
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(1, tokens, 24, generator=generator)
        + 20 * torch.randn(tokens, 1, generator=generator) * torch.eye(24)[3]
    )


def moment_of(index: IndexNet, lod0: Tensor) -> Tensor:
    return index.second_moment(lod0) / lod0[..., 0].numel()


def orthonormal(matrix: Tensor) -> Tensor:
    """The matrix with the same directions, all equally strong."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def test_a_white_index_hears_every_direction_alike() -> None:
    lod0, index = crowded(4000), IndexNet(dim=24, lens_dim=16)
    x = F.rms_norm(lod0[0], (24,))
    moment = moment_of(index, lod0)
    torch.testing.assert_close(
        moment, (x[:, :, None] * x[:, None]).double().mean(0), atol=1e-5, rtol=1e-5
    )

    before = index.project.weight.detach().double().clone()
    index.whiten(moment, tokens=4000)
    after = index.project.weight.detach().double()
    torch.testing.assert_close(
        (after @ moment @ after.T).trace(),
        (before @ moment @ before.T).trace(),
        msg="the mean square stays",
    )
    values, directions = torch.linalg.eigh(
        moment + (0.01 + 24 / 4000) * moment.trace() / 24 * torch.eye(24)
    )
    root = directions @ values.sqrt().diag() @ directions.T
    unwhitened = after @ root
    torch.testing.assert_close(
        unwhitened / unwhitened.norm(), orthonormal(before) / 4, atol=1e-5, rtol=1e-4
    )
    energies, axes = torch.linalg.eigh(moment)
    drawn, white = (
        torch.linalg.svdvals(projection @ axes @ energies.sqrt().diag())
        for projection in (before, after)
    )
    assert drawn[0] / drawn[-1] > 2 * white[0] / white[-1], (
        "what the text makes of them is less uneven"
    )


@pytest.mark.parametrize("width", [24, 40])
def test_a_white_index_that_is_wide_enough_keeps_the_cosines_of_white_embeddings(
    width: int,
) -> None:
    lod0, index = crowded(4000), IndexNet(dim=24, lens_dim=width)
    moment = moment_of(index, lod0)
    index.whiten(moment, tokens=4000)
    shrunk = moment + (0.01 + 24 / 4000) * moment.trace() / 24 * torch.eye(24)
    x = F.rms_norm(lod0[0, :50], (24,)).double()
    white = torch.linalg.solve(torch.linalg.cholesky(shrunk), x.T).T
    found = index.token_vectors(lod0[:, :50])[0].detach().double()
    cosines = [F.normalize(y, dim=-1) @ F.normalize(y, dim=-1).T for y in (found, white)]
    torch.testing.assert_close(*cosines, atol=1e-4, rtol=1e-4)


def test_few_tokens_whiten_little() -> None:
    index, lod0 = IndexNet(dim=24, lens_dim=16), crowded(2)
    before = orthonormal(index.project.weight.detach().clone())
    index.whiten(moment_of(index, lod0), tokens=1)
    turned = F.cosine_similarity(index.project.weight.detach(), before)
    assert turned.min() > 0.98


def test_index_vectors_are_computed_in_float32_under_autocast() -> None:
    index = wake(IndexNet(dim=8, lens_dim=6))
    lod0 = torch.randn(1, 64, 8)
    expected = index(lod0, block_size=4, max_lod=2)
    with torch.autocast("cpu", torch.bfloat16):
        table = index(lod0, block_size=4, max_lod=2)
    assert torch.equal(table, expected)  # bf16 products would differ by about 0.3 %
    torch.testing.assert_close(table[:, -1], table[:, 48:64].sum(1), atol=1e-5, rtol=1e-5)


def test_an_index_of_half_precision_weights_works_under_autocast() -> None:
    index = wake(IndexNet(dim=8, lens_dim=6)).bfloat16()
    lod0 = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = index.token_vectors(lod0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, index.float().token_vectors(lod0), atol=0.03, rtol=0.03)


def test_each_entry_has_the_index_vector_of_its_own_node_and_sequence() -> None:
    lens, (lods, starts) = lensnet(), plan(MC, 2)
    lod0 = torch.randn(2, 96, 32)
    assert lens.index is not None
    vectors = lens.index.token_vectors(lod0)
    found = lens.entry_index(lens.index_table(lod0), lods[:, :VISIBLE], starts[:, :VISIBLE])
    for row in range(8):
        for entry in range(VISIBLE):
            covered = reference.tokens_of(
                (int(lods[row, entry]), int(starts[row, entry])), MC.block_size
            )
            torch.testing.assert_close(
                found[row, entry], vectors[row // 4, covered].sum(0), atol=1e-5, rtol=1e-5
            )


def test_queries_and_keys_start_equal_where_tied_and_part_in_training() -> None:
    for layer in lensnet(awake=False).asks:
        assert torch.equal(layer.query.weight, layer.key.weight)
        assert layer.query.weight is not layer.key.weight
        assert layer.query.weight.data_ptr() != layer.key.weight.data_ptr()
    for layer in lensnet(mc_config(lens_ask="untied")).asks:
        assert not torch.allclose(layer.query.weight, layer.key.weight)
    assert len(lensnet().asks) == MC.lens_layers, "one before each block"
    assert len(lensnet(mc_config(lens_ask="none")).asks) == 0


def test_the_sink_starts_a_little_above_the_whole_visible_tail() -> None:
    for layer in lensnet(awake=False).asks:
        assert layer.sink_logit.item() == pytest.approx(math.log(TAIL) + 0.5)
        assert layer.gain.item() == 1.0
        assert layer.sink_logit.requires_grad
        assert layer.gain.requires_grad


def ask(dim: int = 16, length: int = 5) -> AskLayer:
    """An ask layer that shows the mass it puts on the tail: it adds that share of the tail's
    (constant) value.
    """
    torch.manual_seed(0)
    layer = AskLayer(dim=dim, num_read=length, tied=True)
    with torch.no_grad():
        for linear in (layer.value, layer.out):
            linear.weight.copy_(torch.eye(dim))
    return layer


@torch.no_grad()
def mass(layer: AskLayer, index: Tensor, index_tail: Tensor) -> Tensor:
    x = torch.zeros(*index.shape[:2], index.size(2))
    return layer(x, torch.ones_like(index_tail), index, index_tail)[0, :, 0]


def test_the_mass_on_the_tail_says_whether_anything_matched() -> None:
    """Random vectors of 256 channels hardly match: near 1 / (1 + sqrt(e)) lies on the tail. A
    vector that is there draws nearly all.
    """
    generator = torch.Generator().manual_seed(1)
    tail, others = (
        torch.randn(1, 5, 256, generator=generator),
        torch.randn(1, 40, 256, generator=generator),
    )
    layer = ask(dim=256)
    nothing = mass(layer, torch.zeros(1, 1, 256), torch.zeros(1, 5, 256))
    torch.testing.assert_close(nothing, torch.full((1,), 1 / (1 + math.exp(0.5))))
    strangers, same = mass(layer, others, tail), mass(layer, tail, tail)
    assert same.min() > 0.99
    assert strangers.max() < 0.9
    assert 0.25 < strangers.mean() < 0.6


def test_logits_are_gained_cosines_times_the_root_of_the_width() -> None:
    """Written out: softmax over the tail and a sink of value zero."""
    dim, gain, sink = 16, 1.5, 0.3
    torch.manual_seed(3)
    layer = AskLayer(dim=dim, num_read=5, tied=False)
    with torch.no_grad():
        layer.gain.fill_(gain)
        layer.sink_logit.fill_(sink)
    x, tail, index, index_tail = (torch.randn(1, n, dim) for n in (7, 5, 7, 5))

    def expected(query: Tensor, key: Tensor) -> Tensor:
        value, query, key = (
            layer.value(F.rms_norm(tail, (dim,)))[0],
            layer.query(query)[0],
            layer.key(key)[0],
        )
        cosine = F.cosine_similarity(query[:, None], key[None], dim=-1)
        weights = (gain * cosine * dim**0.5).exp()
        return x + layer.out(weights @ value / (weights.sum(-1, keepdim=True) + math.exp(sink)))

    torch.testing.assert_close(
        layer(x, tail, index, index_tail)[0], expected(index, index_tail)[0], atol=1e-5, rtol=1e-4
    )
    plain = expected(F.rms_norm(x, (dim,)), F.rms_norm(tail, (dim,)))[0]
    torch.testing.assert_close(layer(x, tail, None, None)[0], plain, atol=1e-5, rtol=1e-4)


def test_an_ask_layer_of_half_precision_weights_asks_in_half_precision() -> None:
    layer = ask()
    x, tail = (
        torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (7, 5)
    )
    expected = layer(x.float(), tail.float(), None, None)
    found = layer.bfloat16()(x, tail, None, None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_asking_has_no_positions() -> None:
    layer = ask()
    x, tail, index, index_tail = (torch.randn(2, n, 16) for n in (7, 5, 7, 5))
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(
        layer(x, tail[:, order], index, index_tail[:, order]), layer(x, tail, index, index_tail)
    )


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_only_the_visible_tail_is_asked() -> None:
    """An ask layer alone (the blocks do nothing): entries of the head do not reach each other,
    the tail reaches all.
    """
    mc = mc_config(lens_layers=1)
    lens, (lods, starts) = lensnet(mc).double(), plan(mc, 1)
    for block in lens.blocks:
        for projection in (block.out, block.down):
            projection.weight.zero_()
    entries = torch.randn(4, VISIBLE, 32, generator=torch.Generator().manual_seed(2)).double()
    index = torch.randn(4, VISIBLE, 32, generator=torch.Generator().manual_seed(3)).double()
    before = lens.score(entries, lods[:, :VISIBLE], starts[:, :VISIBLE], index)
    for at in range(VISIBLE):
        changed = index.clone()
        changed[:, at] += 1
        moved = (
            lens.score(entries, lods[:, :VISIBLE], starts[:, :VISIBLE], changed) - before
        ).abs().amax(0) > 1e-12
        expected = torch.full((VISIBLE,), at >= VISIBLE - TAIL)
        expected[at] = True
        assert torch.equal(moved, expected), at


def companions(lods: Tensor, starts: Tensor, head_len: int, block_size: int) -> list[set[int]]:
    """Of each entry of a row [M]: the tokens of its block, where all of them lie open in the
    head, else itself.
    """
    found = []
    for level, start in zip(lods.tolist(), starts.tolist(), strict=True):
        of_block = [start // block_size * block_size + i for i in range(block_size)]
        places = [i for i in range(head_len) if lods[i] == 0 and int(starts[i]) in of_block]
        found.append(
            set(places)
            if level == 0 and len(places) == block_size and start in starts[:head_len]
            else set()
        )
    return [of_entry if i in of_entry else {i} for i, of_entry in enumerate(found)]


@pytest.mark.parametrize("max_lod", [1, 2])
@torch.no_grad()
def test_tokens_of_an_opened_block_share_the_best_of_their_scores(max_lod: int) -> None:
    """All else, gists and tail and the tokens of half a block, has its own."""
    mc = mc_config(max_lod=max_lod, lens_block_scores="shared")
    lens, (lods, starts) = lensnet(mc), plan(mc, 1)
    lods, starts = lods[:, :VISIBLE], starts[:, :VISIBLE]
    entries, index = torch.randn(
        2, 4, VISIBLE, 32, generator=torch.Generator().manual_seed(8)
    ).unbind()
    found = lens.score(entries, lods, starts, index)
    alone = lensnet(mc_config(max_lod=max_lod)).score(entries, lods, starts, index)
    sharing = 0
    for row in range(4):
        for i, of_entry in enumerate(
            companions(lods[row], starts[row], VISIBLE - TAIL, mc.block_size)
        ):
            assert found[row, i] == max(alone[row, j] for j in of_entry)
            sharing += len(of_entry) > 1
    assert sharing >= 4 * mc.block_size
    assert not torch.equal(found, alone)


def test_the_best_token_of_a_block_learns_for_all_of_them() -> None:
    """The gradient of a block's mean score, which is what preferences are made of, is that of
    its best token, also if two are equal.
    """
    lods, starts = torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None]
    score = torch.tensor([[0.1, 0.7, -0.2, 0.7, 0.0, 0.5, -0.5, 0.4]], requires_grad=True)
    shared(score, opened_blocks(lods, starts, 8, 4))[:, :4].mean().backward()
    assert score.grad is not None
    assert score.grad.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]
    everywhere = shared(
        score, opened_blocks(lods, starts, 6, 4)
    )  # the second block reaches into the tail
    torch.testing.assert_close(
        everywhere, torch.tensor([[0.7, 0.7, 0.7, 0.7, 0.0, 0.5, -0.5, 0.4]])
    )


@torch.no_grad()
def test_level_tail_position_and_index_are_told_to_the_blocks() -> None:
    """Each by itself changes the scores of the rows it concerns, without ask layers to carry it."""
    lens, (lods, starts) = lensnet(mc_config(lens_ask="none")), plan(MC, 1)
    entries, index = torch.randn(
        2, 4, VISIBLE, 32, generator=torch.Generator().manual_seed(4)
    ).unbind()
    lods, starts = lods[:, :VISIBLE], starts[:, :VISIBLE]

    def change(lods: Tensor = lods, starts: Tensor = starts, index: Tensor = index) -> Tensor:
        return (lens.score(entries, lods, starts, index) - before).abs()

    before = lens.score(entries, lods, starts, index)
    assert change(starts=starts * 2).max() > 1e-5
    torch.testing.assert_close(
        lens.score(entries, lods, starts + 64, index), before, atol=1e-4, rtol=1e-4
    )  # distances alone count
    bent = index.clone()
    bent[:, 7] += 1
    assert change(index=bent)[:, 7].min() > 1e-4
    torch.testing.assert_close(
        lens.score(entries, lods, starts, 3 * index), before
    )  # a gist's sum is normed before it is used
    lens.lod_embedding.weight[2] += 1
    moved = change().amax(1) > 1e-4
    assert torch.equal(moved, (lods == 2).any(1)), "rows with LOD2 entries, and not the baseline"
    lens.lod_embedding.weight[2] -= 1
    lens.tail_embedding += 1
    moved = change().mean(0)
    assert moved[-TAIL:].mean() > 2 * moved[:-TAIL].mean()


@torch.no_grad()
def test_a_shorter_working_context_of_the_curriculum_fits_the_same_lensnet() -> None:
    short = mc_config(train_wc_length=72)
    net, lens, (lods, starts) = model(run_config()), lensnet(), plan(short, 2)
    assert scores(net, lens, tokens(MC, 2), lods, starts).shape == (8, 72)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_the_second_ask_layer_can_read_what_is_open_and_nothing_else() -> None:
    """Ask layers alone (the blocks do nothing), all logits equal: which entries move when the
    index of one entry changes.
    """
    mc = mc_config(lens_layers=2, lens_ask_reach="open")
    lens, (lods, starts) = lensnet(mc).double(), plan(mc, 1)
    lods, starts = lods[:, :VISIBLE], starts[:, :VISIBLE]
    assert lens.asks[0].relevance is None, "the first layer reads the tail alone"
    assert lens.asks[1].relevance is not None
    for block in lens.blocks:
        for projection in (block.out, block.down):
            projection.weight.zero_()
    lens.asks[0].out.weight.zero_()
    lens.asks[1].trust.zero_()
    entries, index = (
        torch.randn(2, 4, VISIBLE, 32, generator=torch.Generator().manual_seed(5)).double().unbind()
    )
    before = lens.score(entries, lods, starts, index)
    for at in range(VISIBLE):
        changed = index.clone()
        changed[:, at] += 1
        moved = (lens.score(entries, lods, starts, changed) - before).abs() > 1e-12
        others = torch.arange(VISIBLE) != at
        assert torch.equal(moved[:, others], (lods[:, at] == 0)[:, None].expand(4, VISIBLE - 1)), at


@torch.no_grad()
def test_at_first_a_block_two_deviations_behind_has_e_to_the_minus_six_of_the_weight() -> None:
    layer = AskLayer(dim=16, num_read=5, tied=True, relevance=True)
    for linear in (layer.value, layer.out):
        linear.weight.copy_(torch.eye(16))
    nothing = torch.zeros(1, 1, 16)
    read, standings = torch.eye(16)[None, :2], torch.tensor([[0.0, -2.0]])
    best, behind, *rest = layer(nothing, read, nothing, torch.zeros(1, 2, 16), standings)[0, 0]
    assert behind / best == pytest.approx(math.exp(-6), rel=1e-4)
    assert not any(rest)


@torch.no_grad()
def test_relevance_decides_what_of_the_open_is_listened_to() -> None:
    layer = AskLayer(dim=16, num_read=5, tied=True, relevance=True)
    x, index = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(6)).unbind()
    third = torch.full((1, 5), -torch.inf).index_fill(1, torch.tensor(3), 0)
    plain, alone = layer(x, x, index, index), layer(x, x, index, index, third)
    assert torch.equal(layer(x, x, index, index, torch.zeros(1, 5)), plain)
    behind = layer(x, x, index, index, third.clamp_min(-9))
    torch.testing.assert_close(behind, alone, atol=1e-4, rtol=1e-4)
    assert (alone - plain).abs().max() > 0.1
    with torch.enable_grad():
        layer(x, x, index, index, third).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters()), (
        "what is closed has no say in gradients either"
    )
    heard = layer.norm(x)[0, 3]
    layer.relevance.weight.copy_(100 * heard / heard.square().sum().sqrt())
    torch.testing.assert_close(
        layer(x, x, index, index), layer(x, x, index, index, third), atol=1e-3, rtol=1e-3
    )


@settings(max_examples=80, deadline=None)
@given(
    levels=st.lists(st.integers(0, 1), min_size=1, max_size=9),
    stray=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    equal=st.booleans(),
)
def test_an_opened_block_stands_where_its_best_token_does(
    levels: list[int], stray: int, seed: int, equal: bool
) -> None:
    """Blocks of four as `levels` say, some tokens of one that is not whole, and a tail of seven
    with scores that nobody taught.
    """
    tokens, tail = [], 7
    for block, level in enumerate(levels):
        tokens += [(level, 4 * block)] if level else [(0, 4 * block + i) for i in range(4)]
    tokens += [(0, 4 * len(levels) + i) for i in range(stray + tail)]
    lods, starts = (torch.tensor([x]) for x in zip(*tokens, strict=True))
    head_len = len(tokens) - tail
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    scores = (
        order[None] / len(tokens)  # far apart: a spread as small as rounding counts as none
        if not equal
        else torch.full(lods.shape, 0.7)
    )
    scores[:, head_len:] = 9.0
    blocks = opened_blocks(lods, starts, head_len, 4)
    stands = standing(scores, blocks, lods)[0]

    opened = [block for block, level in enumerate(levels) if level == 0]
    best = {
        block: max(
            float(s)
            for s, start in zip(scores[0, :head_len], starts[0], strict=False)
            if start // 4 == block
        )
        for block in opened
    }
    mean = sum(best.values()) / max(1, len(best))
    spread = math.sqrt(sum((x - mean) ** 2 for x in best.values()) / max(1, len(best)))
    ahead = {
        block: (x - mean) / spread if len(best) > 1 and not equal else 0.0
        for block, x in best.items()
    }
    top = max([0.0, *ahead.values()])
    for i, (level, start) in enumerate(tokens):
        expected = ahead.get(start // 4, 0.0) if i < head_len else 0.0
        assert float(stands[i]) == (
            -math.inf if level else pytest.approx(expected - top, abs=5e-3)
        ), i


def test_rows_stand_by_themselves() -> None:
    lods, starts = plan(MC, 2)
    scores = torch.randn(lods.shape, generator=torch.Generator().manual_seed(4))
    scores *= torch.arange(1, len(lods) + 1)[:, None]

    def stands(rows: slice) -> Tensor:
        blocks = opened_blocks(lods[rows], starts[rows], VISIBLE - TAIL, MC.block_size)
        return standing(scores[rows], blocks, lods[rows])

    together = stands(slice(None))
    for row in range(len(lods)):
        torch.testing.assert_close(together[row], stands(slice(row, row + 1))[0])


def test_a_spread_within_rounding_is_none_at_any_scale() -> None:
    """Two opened blocks and a tail of two: a difference of a millionth of their scores says
    nothing, one of a hundredth puts one of them two deviations behind. Each row has its scale.
    """
    scale = torch.tensor([[1e-3], [0.1], [1.0], [100.0]], dtype=torch.float64)
    lods, starts = torch.zeros(4, 10, dtype=torch.int64), torch.arange(10).expand(4, -1)
    blocks = opened_blocks(lods, starts, 8, 4)
    for difference, behind in ((1e-6, 0.0), (1e-2, -2.0)):
        scores = torch.tensor([1.0] * 4 + [1.0 - difference] * 4 + [7.0] * 2, dtype=torch.float64)
        expected = torch.tensor([0.0] * 4 + [behind] * 4 + [behind / 2] * 2, dtype=torch.float64)
        found = standing(scale * scores, blocks, lods)
        torch.testing.assert_close(found, expected.expand(4, -1), atol=0.05, rtol=0)


def test_scores_next_to_zero_put_no_block_ahead() -> None:
    """As those of early heads that have hardly moved from zero."""
    lods, starts = torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)[None]
    scores = torch.tensor([[0.0] * 4 + [1e-10] * 4])
    found = standing(scores, opened_blocks(lods, starts, 8, 4), lods)
    torch.testing.assert_close(found, torch.zeros(1, 8), atol=0.05, rtol=0)


def test_a_row_of_gists_alone_opens_nothing() -> None:
    """Every entry is a block of its own: as many blocks as entries."""
    lods, starts = torch.ones(1, 6, dtype=torch.int64), 4 * torch.arange(6)[None]
    scores, blocks = torch.arange(6.0)[None], opened_blocks(lods, starts, 6, 4)
    assert blocks.first.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert not blocks.is_whole.any()
    assert torch.equal(shared(scores, blocks), scores)


@torch.no_grad()
def test_by_order_scores_do_not_know_where_in_the_history_an_entry_lies() -> None:
    entries, index = torch.randn(
        2, 4, VISIBLE, 32, generator=torch.Generator().manual_seed(7)
    ).unbind()
    lods, starts = (part[:, :VISIBLE] for part in plan(MC, 1))
    for scheme in ("order", "span"):
        lens = lensnet(mc_config(position_scheme=scheme))
        far = (
            starts // MC.block_size * MC.block_size * 4096 + starts % MC.block_size
        )  # blocks stay whole
        same = torch.equal(
            lens.score(entries, lods, starts, index), lens.score(entries, lods, far, index)
        )
        assert same == (scheme == "order")
