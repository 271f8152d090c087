"""FP8 products: what they round, what they keep for the backward pass, and where they are used."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_ds.config import ConfigError, RunConfig
from mc_ds.model.backbone import fp8 as fp8_module
from mc_ds.model.backbone.fp8 import BACKWARD, FORWARD, linear
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config
from tests.support.factories import mc_config, model, plan, run_config, tokens

ROUNDING = {FORWARD: 2**-4, BACKWARD: 2**-3}
"""Half a unit in the last place, relative."""


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as FP8 holds it with one scale, written down naively."""
    largest = max(abs(value) for value in x.flatten().tolist())
    scale = torch.finfo(dtype).max / largest
    return (x.double() * scale).to(dtype).double() / scale


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and incoming gradient of very different magnitudes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 48), (64, 48), (2, 16, 64))
    x, weight, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    return (
        (1e3 * x).to(dtype).requires_grad_(),
        nn.Parameter((1e-2 * weight).to(dtype)),
        (1e-6 * gradient).to(dtype),
    )


def test_results_are_products_of_rounded_factors() -> None:
    x, weight, gradient = inputs()
    found = linear(x, weight, fp8=True)
    of_x, of_weight = torch.autograd.grad(found, [x, weight], gradient)
    x8, weight8 = rounded(x, FORWARD), rounded(weight, FORWARD)
    gradient8 = rounded(gradient, BACKWARD)
    expected = [x8 @ weight8.T, gradient8 @ weight8, gradient8.flatten(0, 1).T @ x8.flatten(0, 1)]
    for mine, value in zip((found, of_x, of_weight), expected, strict=True):
        scale = value.abs().max()
        torch.testing.assert_close(mine.double() / scale, value / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_the_linear_map_within_the_rounding(dtype: torch.dtype) -> None:
    x, weight, gradient = inputs(dtype)
    results = []
    for fp8 in (True, False):
        y = linear(x, weight, fp8=fp8)
        results.append((y, *torch.autograd.grad(y, [x, weight], gradient)))
    forward, backward = ROUNDING[FORWARD], ROUNDING[BACKWARD]
    # Each term of a product is off by the sum of its factors' errors at most.
    limits = (2 * forward, forward + backward, forward + backward)
    for found, expected, limit in zip(*results, limits, strict=True):
        assert found.dtype == expected.dtype == dtype
        assert (found - expected).float().norm() < limit * expected.float().norm()
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["input", "gradient"])
def test_what_is_not_finite_stays_so(bad: float, place: str) -> None:
    x, weight, gradient = inputs()
    with torch.no_grad():
        (x if place == "input" else gradient).view(-1)[5] = bad
    y = linear(x, weight, fp8=True)
    of_x, of_weight = torch.autograd.grad(y, [x, weight], gradient)
    assert not of_weight.isfinite().all()
    assert not (y if place == "input" else of_x).isfinite().all()


def test_zeros_and_frozen_weights() -> None:
    x, weight, gradient = inputs()
    zeros = torch.zeros_like(x, requires_grad=True)
    y = linear(zeros, weight.detach(), fp8=True)
    assert not y.any()
    (of_x,) = torch.autograd.grad(y, [zeros], gradient)
    assert of_x.isfinite().all()


@pytest.mark.gpu
def test_compiled_products_on_a_gpu_are_those_of_the_cpu() -> None:
    x, weight, gradient = inputs(torch.bfloat16)
    y = linear(x, weight, fp8=True)
    expected = (y, *torch.autograd.grad(y, [x, weight], gradient))
    function = torch.compile(partial(linear, fp8=True), fullgraph=True, dynamic=False)
    on_gpu = [t.detach().cuda().requires_grad_() for t in (x, weight)]
    y = function(*on_gpu)
    found = (y, *torch.autograd.grad(y, on_gpu, gradient.cuda()))
    for mine, value in zip(found, expected, strict=True):
        assert (mine.cpu() - value).float().norm() < 2**-7 * value.float().norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_no_copy_of_the_weight_outlives_the_forward_pass(compiled: bool) -> None:
    """Under ZeRO-3 it would be a whole model on every rank."""
    x, weight, gradient = inputs(torch.bfloat16)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.silu(linear(x, weight, fp8=True))

    torch._dynamo.reset()
    if compiled:
        options: dict[str, Any] = dict(backend="aot_eager", fullgraph=True, dynamic=False)
        function = torch.compile(function, **options)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function(x, weight)
    assert any(t is weight or t.data_ptr() == weight.data_ptr() for t in kept)
    others = [t for t in kept if t.data_ptr() != weight.data_ptr()]
    assert not [t for t in others if t.numel() == weight.numel()]
    found = torch.autograd.grad(y, [x, weight], gradient)
    expected = torch.autograd.grad(F.silu(linear(x, weight, fp8=True)), [x, weight], gradient)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-6)
    torch._dynamo.reset()


def test_only_the_four_projections_of_decoder_blocks_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluation does not: there, no entry changes another row or an earlier entry."""
    config = run_config(mc_config(train_wc_length=48), precision="fp8", micro_batch_size=2)
    net = model(config)
    weights: list[Tensor] = []
    product = fp8_module._Linear.apply
    monkeypatch.setattr(
        fp8_module._Linear, "apply", lambda x, w: weights.append(w) or product(x, w)
    )
    (lods, starts), ids = plan(config.mc, 2), tokens(config.mc, 2)
    net.train()
    net(ids, lods, starts)
    projections = [
        module.weight
        for block in net.backbone.blocks
        for module in (block.qkv, block.out, block.gate_up, block.down)
    ]
    assert [id(w) for w in weights] == [id(w) for w in projections]
    weights.clear()
    net.eval()
    net(ids, lods, starts)
    assert not weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": {"dim": 40}}, "backbone.dim = 40 is not a multiple of 16"),
        ({"backbone": {"ffn_dim": 50}}, "backbone.ffn_dim = 50 is not a multiple of 16"),
        ({"train": {"micro_batch_size": 1}}, "entries of a micro-step at W = 40 = 120 is not"),
    ],
    ids=str,
)
def test_shapes_that_it_cannot_have_are_refused(settings: dict[str, Any], message: str) -> None:
    base = {
        "backbone": dict(dim=32, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=48),
        "mc": dict(
            seq_len=64,
            block_size=4,
            train_wc_length=40,
            recent_tokens=12,
            horizon_tokens=4,
            num_random_variants=2,
        ),
        "train": {"precision": "fp8", "micro_batch_size": 2, "global_batch_size": 2},
    }
    RunConfig.model_validate(base)
    given = {name: section | settings.get(name, {}) for name, section in base.items()}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(given)


def test_a_device_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(mc_config(train_wc_length=48), precision="fp8", micro_batch_size=2)
    with pytest.raises(ConfigError, match=r"this is a CPU: use train.precision = auto"):
        resolve_deepspeed_config(config, 1, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"NVIDIA A100 of compute capability 8.0"):
        resolve_deepspeed_config(config, 1, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert resolve_deepspeed_config(config, 1, "cuda")["bf16"]["enabled"]
