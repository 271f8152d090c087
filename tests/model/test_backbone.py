"""The decoder and its chunked loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.model.backbone import Backbone, DecoderBlock
from mc_ds.model.backbone.layers import BlockShape, EncoderBlock, attention, plain_tables, swiglu
from mc_ds.model.backbone.loss import chunk_gradients
from tests.support.factories import VOCAB, run_config

LENGTH = 19


def backbone(*, tied: bool = True, seed: int = 0, **options: Any) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(
        run_config(backbone=dict(tie_embeddings=tied)).backbone, vocab_size=VOCAB, **options
    )


def batch(net: Backbone) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids [2, 19], their labels, and plain rotary tables."""
    ids = torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(9))
    cos, sin = plain_tables(LENGTH, net.config.head_dim, net.config.rope_base, ids.device)
    return ids[:, :-1], ids[:, 1:], cos, sin


def gradients(net: Backbone, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(
            found[name],
            gradient,
            atol=1e-6,
            rtol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 38, 4096])
def test_chunked_loss_and_gradients_equal_the_whole(tied: bool, chunk: int) -> None:
    net = backbone(tied=tied, loss_chunk_entries=chunk)
    ids, labels, cos, sin = batch(net)
    entries = net.embedding(ids)
    weights = torch.rand(
        2, LENGTH, generator=torch.Generator().manual_seed(1)
    )  # each entry's own gradient

    logits = net.hidden(entries, cos, sin) @ (net.embedding.weight if tied else net.head.weight).T
    whole = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
        2, LENGTH
    )
    expected = gradients(net, (weights * whole).sum())

    chunked = net.losses(net.embedding(ids), cos, sin, labels).nll
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-6)
    assert_same(gradients(net, (weights * chunked).sum()), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [7, 38, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weighted_loss_has_its_gradients_from_the_forward_pass(
    tied: bool, chunk: int, dtype: torch.dtype
) -> None:
    net = backbone(tied=tied, loss_chunk_entries=chunk).to(dtype)
    ids, labels, cos, sin = batch(net)
    weights = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1))
    whole = net.losses(net.embedding(ids), cos, sin, labels).nll
    expected = gradients(net, 0.25 * (weights * whole).sum())
    seen: list[int] = []
    inner = net.head.chunk_gradients
    net.head.chunk_gradients = lambda hidden, *others: (
        seen.append(len(hidden)) or inner(hidden, *others)
    )
    output = net.losses(net.embedding(ids), cos, sin, labels, weights)
    assert not output.nll.requires_grad
    assert max(seen) <= chunk
    calls = len(seen)
    found = gradients(net, 0.25 * output.loss)
    assert len(seen) == calls, "the backward pass computes no logits"
    torch.testing.assert_close(output.nll, whole)
    torch.testing.assert_close(output.loss, (weights * whole).sum())
    if dtype == torch.float32:
        assert_same(found, expected)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).float().norm()
        assert difference < 2**-6 * gradient.float().norm(), name


@pytest.mark.parametrize("steps", [2, 3, 12])
def test_the_factor_of_accumulation_is_not_rounded_to_bf16(steps: int) -> None:
    """1/3 in bf16 would make all gradients of the model 0.2 % too large."""
    net = backbone(tied=False, loss_chunk_entries=7).bfloat16()
    ids, labels, cos, sin = batch(net)
    weights, entries = torch.full((2, LENGTH), 0.5), net.embedding(ids)

    def found(factor: Tensor) -> tuple[Tensor, ...]:
        states = net.hidden(entries, cos, sin).flatten(0, 1).detach().requires_grad_()
        loss = net.head(states, labels.flatten(), weights.flatten()).loss
        return torch.autograd.grad(loss * factor, [states, net.head.weight])

    factor = torch.tensor(1 / steps)
    for scaled, whole in zip(found(factor), found(torch.tensor(1.0)), strict=True):
        assert whole.any()
        assert torch.equal(scaled, (whole.float() * factor).bfloat16())


def test_a_frozen_head_passes_gradients_on() -> None:
    net = backbone(tied=False)
    net.head.weight.requires_grad_(False)
    ids, labels, cos, sin = batch(net)
    entries = net.embedding(ids).detach().requires_grad_()
    weights = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1))
    losses = (
        (weights * net.losses(entries, cos, sin, labels).nll).sum(),
        net.losses(entries, cos, sin, labels, weights).loss,
    )
    expected, found = (torch.autograd.grad(loss, entries)[0] for loss in losses)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


def test_evaluation_returns_the_weighted_loss_too() -> None:
    net = backbone().eval()
    ids, labels, cos, sin = batch(net)
    weights = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1))
    output = net.losses(net.embedding(ids), cos, sin, labels, weights)
    torch.testing.assert_close(output.loss, (weights * output.nll).sum())
    assert output.likeliest.shape == (2, LENGTH)


def test_tied_embeddings_are_one_parameter() -> None:
    net = backbone(tied=True)
    assert net.head.weight is net.embedding.weight
    tied, untied = (
        sum(p.numel() for p in backbone(tied=tied).parameters()) for tied in (True, False)
    )
    assert untied - tied == VOCAB * 32


def test_logits_of_all_entries_never_exist_at_once() -> None:
    net = backbone(loss_chunk_entries=5)
    ids, labels, cos, sin = batch(net)
    seen: list[int] = []
    inner = net.head.chunk_nll
    net.head.chunk_nll = lambda hidden, weight, chunk_labels: (
        seen.append(len(hidden)) or inner(hidden, weight, chunk_labels)
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = net.losses(net.embedding(ids), cos, sin, labels).nll.mean()
    assert max(seen) == 5
    assert not any(x.dim() == 2 and x.size(-1) == VOCAB and x.shape[0] > 1 for x in kept), (
        "no logits wait for the backward pass"
    )
    forward_chunks = len(seen)
    loss.backward()
    assert len(seen) == 2 * forward_chunks, "they are recomputed, chunk by chunk"


def test_logits_are_what_the_loss_uses() -> None:
    net = backbone(tied=False)
    ids, labels, cos, sin = batch(net)
    logits = net.head.logits(net.hidden(net.embedding(ids), cos, sin))
    expected = torch.logsumexp(logits, -1) - logits.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(net.losses(net.embedding(ids), cos, sin, labels).nll, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_queries_equal_repeated_keys_and_values(causal: bool) -> None:
    heads, kv_heads, width, dim = 6, 2, 8, 48
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, LENGTH, dim, generator=generator)
    qkv, out = (
        torch.randn((heads + 2 * kv_heads) * width, dim, generator=generator),
        torch.randn(dim, heads * width, generator=generator),
    )
    cos, sin = plain_tables(LENGTH, width, 1e4, x.device)
    query, key, value = qkv.split([heads * width, kv_heads * width, kv_heads * width])
    repeated = [
        part.view(kv_heads, width, dim).repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)
        for part in (key, value)
    ]
    grouped = attention(
        x, cos, sin, qkv, out, BlockShape(heads, kv_heads, causal=causal, norm_eps=1e-5)
    )
    full = attention(
        x,
        cos,
        sin,
        torch.cat([query, *repeated]),
        out,
        BlockShape(heads, heads, causal=causal, norm_eps=1e-5),
    )
    torch.testing.assert_close(grouped, full, atol=1e-4, rtol=1e-4)


def test_attention_equals_the_formula() -> None:
    """Softmax of rotated q.k / sqrt(C) over the past, head by head."""
    heads, width, dim = 2, 6, 12
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 7, dim, generator=generator)
    qkv, out = torch.randn(3 * dim, dim, generator=generator), torch.eye(dim)
    cos, sin = plain_tables(7, width, 1e4, x.device)
    found = attention(x, cos, sin, qkv, out, BlockShape(heads, heads, causal=True, norm_eps=1e-5))[
        0
    ]
    query, key, value = (part.view(7, heads, width) for part in (x[0] @ qkv.T).chunk(3, dim=-1))

    def turned(vector: Tensor, position: int) -> Tensor:
        first, second = vector[: width // 2], vector[width // 2 :]
        c, s = cos[0, position], sin[0, position]
        return torch.cat([first * c - second * s, first * s + second * c])

    for head in range(heads):
        for i in range(7):
            logits = (
                torch.stack(
                    [turned(query[i, head], i) @ turned(key[j, head], j) for j in range(i + 1)]
                )
                / width**0.5
            )
            expected = logits.softmax(0) @ value[: i + 1, head]
            torch.testing.assert_close(
                found[i, head * width : (head + 1) * width], expected, atol=1e-5, rtol=1e-5
            )


def test_a_decoder_block_is_pre_norm_attention_then_swiglu() -> None:
    config = run_config(backbone=dict(norm_eps=0.3)).backbone
    torch.manual_seed(0)
    block = DecoderBlock(config)
    with torch.no_grad():
        for norm in (block.attention_norm, block.ffn_norm):
            norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(1, LENGTH, config.dim)
    cos, sin = plain_tables(LENGTH, config.head_dim, config.rope_base, x.device)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    y = x + attention(
        normed(x, block.attention_norm.weight),
        cos,
        sin,
        block.qkv.weight,
        block.out.weight,
        block.shape,
    )
    gate, up = (normed(y, block.ffn_norm.weight) @ block.gate_up.weight.T).chunk(2, dim=-1)
    expected = y + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
    torch.testing.assert_close(block(x, cos, sin), expected)


def test_the_final_states_are_normed_with_the_models_epsilon() -> None:
    config = run_config(backbone=dict(norm_eps=0.3)).backbone
    torch.manual_seed(0)
    net = Backbone(config, vocab_size=VOCAB)
    ids, _, cos, sin = batch(net)
    x = net.embedding(ids)
    for block in net.blocks:
        x = block(x, cos, sin)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.3).sqrt() * net.norm.weight
    torch.testing.assert_close(net.hidden(net.embedding(ids), cos, sin), expected)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert {norm.eps for norm in norms} == {0.3}, "those of the blocks too"


def test_the_feed_forward_layer_gates_and_is_not_rounded_to_fp8_by_default() -> None:
    x, gate_up, down = (
        torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for shape in ((2, 16), (64, 16), (16, 32))
    )
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x, gate_up, down), (gate / (1 + (-gate).exp()) * up) @ down.T)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_an_encoder_block_is_the_same_without_a_mask_for_states_of_any_size() -> None:
    """Also for states as small as new embeddings, whose mean square is below the epsilon."""
    torch.manual_seed(0)
    block = EncoderBlock(16, 2, std=0.3, out_std=0.3).double()
    cos, sin = plain_tables(LENGTH, 8, 1e4, torch.device("cpu"))

    def normed(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    for size in (1e-3, 1.0):
        x = size * torch.randn(1, LENGTH, 16, dtype=torch.float64)
        shape = BlockShape(2, 2, causal=False, norm_eps=1e-5)
        y = x + attention(normed(x), cos, sin, block.qkv.weight, block.out.weight, shape)
        gate, up = (normed(y) @ block.gate_up.weight.T).chunk(2, dim=-1)
        expected = y + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
        torch.testing.assert_close(block(x, cos, sin), expected, atol=1e-10, rtol=1e-10)


def test_training_alone_uses_the_compiled_block() -> None:
    block = EncoderBlock(16, 2, std=0.3, out_std=0.3)
    x, tables = torch.randn(1, 4, 16), plain_tables(4, 8, 1e4, torch.device("cpu"))
    expected = block(x, *tables)
    block.function = lambda x, cos, sin, weights, shape: x + 1
    assert torch.equal(block(x, *tables), x + 1)
    assert torch.equal(block.eval()(x, *tables), expected)


@pytest.mark.usefixtures("float64")
def test_the_decoder_is_causal_and_reads_all_of_the_past() -> None:
    net = backbone().double()
    ids, _, cos, sin = batch(net)
    for at in (0, 7, LENGTH - 1):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        before, after = (net.hidden(net.embedding(x), cos, sin) for x in (ids, changed))
        moved = (before - after).abs().amax(-1) > 1e-12
        assert not moved[:, :at].any()
        assert moved[:, at:].all()


@pytest.mark.parametrize(
    ("width", "expected"),
    [(24, 64), (32, 128), (48, 128), (64, 192), (72, 192), (73, 256), (768, 2048)],
)
def test_small_networks_have_feed_forward_layers_of_eight_thirds_of_their_width(
    width: int, expected: int
) -> None:
    """Rounded up to a multiple of 64."""
    block = EncoderBlock(width, 1, std=0.1, out_std=0.1)
    assert block.gate_up.weight.shape == (2 * expected, width)
    assert block.down.weight.shape == (width, expected)


def test_what_is_recomputed_draws_nothing_and_gives_single_gradients_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No random state is saved, which a CUDA graph could not do; and gradients of some
    parameters alone can be asked for, which reentrant checkpointing refuses.
    """

    def read() -> None:
        raise AssertionError("the random state is saved")

    monkeypatch.setattr(torch, "get_rng_state", read)
    net = backbone(activation_checkpointing=1.0)
    ids, labels, cos, sin = batch(net)
    loss = net.losses(net.embedding(ids), cos, sin, labels).nll.mean()
    (found,) = torch.autograd.grad(loss, [net.blocks[0].qkv.weight])
    plain = backbone()
    expected = gradients(plain, plain.losses(plain.embedding(ids), cos, sin, labels).nll.mean())
    torch.testing.assert_close(found, expected["blocks.0.qkv.weight"])


def test_evaluation_never_uses_the_compiled_loss() -> None:
    net, calls = backbone().eval(), []
    ids, labels, cos, sin = batch(net)
    expected = net.losses(net.embedding(ids), cos, sin, labels)
    net.head.chunk_nll = lambda *args: calls.append(args)
    found = net.losses(net.embedding(ids), cos, sin, labels)
    assert calls == []
    assert torch.equal(found.nll, expected.nll)
    logits = net.head.logits(net.hidden(net.embedding(ids), cos, sin))
    assert torch.equal(found.likeliest, logits.argmax(-1))


def test_every_state_needs_its_label_and_its_weight() -> None:
    head, states = backbone(loss_chunk_entries=4).head, torch.zeros(8, 32)
    labels = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        head(states, labels[:4])
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        head(states, labels, torch.ones(4))


def test_losses_beside_their_sum_have_no_gradient_in_evaluation_either() -> None:
    head = backbone().head
    for training in (True, False):
        output = head.train(training)(
            torch.randn(8, 32), torch.zeros(8, dtype=torch.int64), torch.full((8,), 0.5)
        )
        assert output.loss is not None
        assert output.loss.requires_grad
        assert not output.nll.requires_grad
        torch.testing.assert_close(output.loss.detach(), 0.5 * output.nll.sum())


def test_the_gradient_of_a_frozen_projection_is_not_computed() -> None:
    inputs = torch.randn(4, 8), torch.randn(VOCAB, 8), torch.zeros(4, dtype=torch.int64)
    for trained in (False, True):
        found = chunk_gradients(*inputs, torch.ones(4), trained)
        assert (found.weight is not None) == trained


@pytest.mark.parametrize("layers", [1, 8])
def test_initialisation_scales_residual_outputs_by_depth(layers: int) -> None:
    torch.manual_seed(0)
    config = run_config(
        backbone=dict(num_layers=layers, dim=128, ffn_dim=256, init_std=0.05)
    ).backbone
    net = Backbone(config, vocab_size=512)
    block = net.blocks[0]
    for weight in (net.embedding.weight, block.qkv.weight, block.gate_up.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.05)
    for weight in (block.out.weight, block.down.weight):
        assert weight.std().item() == pytest.approx(0.05 / (2 * layers) ** 0.5, rel=0.05)


@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_attention_is_left_out_where_its_backward_can_give_nan(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel without a causal mask; the causal one, which is sound, stays, and so does the
    setting outside.
    """
    allowed: list[bool] = []
    real = F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    cos, sin = plain_tables(LENGTH, 8, 10_000.0, torch.device("cpu"))
    attention(
        torch.randn(2, LENGTH, 16),
        cos,
        sin,
        torch.randn(48, 16),
        torch.randn(16, 16),
        BlockShape(2, 2, causal, 1e-5),
    )
    assert before
    assert allowed == [causal]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("length", [64, 192])
def test_gradients_are_finite_where_all_logits_are_far_below_zero(
    length: int, compiled: bool
) -> None:
    """Every query's first channel is 1, every key's -120 sqrt(C): logits of -120. cuDNN's kernel
    gave NaN at these lengths on an H200.
    """
    dim = 64
    x = torch.randn(2, length, dim, device="cuda", dtype=torch.bfloat16)
    x[..., 0] = 1.0
    x.requires_grad_()
    qkv = torch.zeros(3 * dim, dim, device="cuda", dtype=torch.bfloat16)
    qkv[0, 0], qkv[dim, 0] = 1.0, -120 * dim**0.5
    qkv[2 * dim :] = torch.eye(dim)
    cos, sin = (
        torch.ones(1, length, dim // 2, device="cuda"),
        torch.zeros(1, length, dim // 2, device="cuda"),
    )
    function = torch.compile(attention, dynamic=False) if compiled else attention
    out = function(
        x,
        cos,
        sin,
        qkv,
        torch.eye(dim, device="cuda", dtype=torch.bfloat16),
        BlockShape(1, 1, False, 1e-5),
    )
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_grouped_heads_does_not_store_its_weights(dtype: torch.dtype) -> None:
    dim, heads, kv_heads, length = 64, 4, 2, 8192
    x = torch.randn(1, length, dim, device="cuda", dtype=dtype)
    qkv = torch.randn(dim * 2, dim, device="cuda", dtype=dtype) / dim**0.5
    cos, sin = plain_tables(length, dim // heads, 1e4, x.device)
    shape = BlockShape(num_heads=heads, num_kv_heads=kv_heads, causal=True, norm_eps=1e-5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(x, cos, sin, qkv, torch.eye(dim, device="cuda", dtype=dtype), shape)
    assert torch.cuda.max_memory_allocated() - before < heads * length**2  # a byte per weight
    first = attention(x[:, :64], cos[:, :64], sin[:, :64], qkv, torch.eye(dim).to(x), shape)
    torch.testing.assert_close(out[:, :64], first, rtol=2e-2, atol=2e-2)
