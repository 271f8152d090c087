"""The engine: how it judges a step, and which runs are launched as CUDA graphs."""

from functools import partial
from typing import Any

import pytest
import torch

from mc_ds.config import ConfigError, RunConfig
from mc_ds.model.backbone.layers import transformer_block
from mc_ds.model.lensnet import LensNet
from mc_ds.training.engine import engine as engine_module
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config
from mc_ds.training.engine.engine import (
    Frozen,
    build_engine,
    build_sharded_model,
    compile_lensnet,
    freeze,
    use_graphs,
)
from tests.support.factories import VOCAB, mc_config, model, plan, run_config, tokens, wake

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def config_of(stage: int, **train: Any) -> RunConfig:
    mc = mc_config()
    config = run_config(mc, global_batch_size=2, micro_batch_size=2, **train)
    return config.model_copy(update={"deepspeed_config": f"ds_configs/zero{stage}.json"})


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (2, "fp32"), (1, "fp32")])
def test_a_step_is_judged_by_the_norm_of_all_gradients(
    stage: int,
    precision: str,
    single_process: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The norm is DeepSpeed's own, over pieces; where it is not finite the step is skipped."""
    monkeypatch.setattr(engine_module, "NORM_PIECE", 1000)
    config = config_of(stage, precision=precision)
    ds_config = resolve_deepspeed_config(config, 1, "cpu")
    model = build_sharded_model(config, ds_config, vocab_size=VOCAB)
    engine = build_engine(config, ds_config, model, single_process)
    monkeypatch.delattr(type(engine.optimizer), "has_overflow")  # nothing else is looked at
    ids, (lods, starts) = tokens(config.mc, 2), plan(config.mc, 2)
    theirs = type(engine.optimizer).get_grad_norm_direct
    expected: list[float] = []
    ours = engine.optimizer.get_grad_norm_direct

    def compared(gradients: Any, params: Any, norm_type: float = 2) -> Any:
        expected.append(float(theirs(engine.optimizer, gradients, params, norm_type)))
        return ours(gradients, params, norm_type)

    engine.optimizer.get_grad_norm_direct = compared
    for factor, finite in ((1.0, True), (float("nan"), False), (float("inf"), False), (1.0, True)):
        expected.clear()
        before = [p.detach().clone() for p in model.parameters()]
        engine.backward(engine(ids, lods, starts).loss * factor)
        engine.step()
        assert engine.was_step_applied() is finite
        changed = [
            not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
        ]
        assert any(changed) is finite
        if finite:
            whole = sum(norm**2 for norm in expected) ** 0.5
            assert float(engine.get_global_grad_norm()) == pytest.approx(whole, rel=1e-5)
    assert engine.skipped_steps == 2


def test_bf16_under_zero_1_trains_with_an_optimizer_of_its_own(
    single_process: torch.device,
) -> None:
    """DeepSpeed uses another class there, which none of the replacements fit."""
    config = config_of(1, precision="bf16")
    ds_config = resolve_deepspeed_config(config, 1, "cpu")
    model = build_sharded_model(config, ds_config, vocab_size=VOCAB)
    engine = build_engine(config, ds_config, model, single_process)
    engine.backward(engine(tokens(config.mc, 2), *plan(config.mc, 2)).loss)
    engine.step()
    assert engine.was_step_applied()


@pytest.mark.parametrize(
    ("stage", "wanted", "device", "weights", "expected"),
    [
        (2, "auto", GPU, 10_000, True),
        (1, "auto", GPU, 10_000, True),
        (3, "auto", GPU, 10_000, False),
        (2, "auto", CPU, 10_000, False),
        (2, "off", GPU, 10_000, False),
        (2, "auto", GPU, 10**10, False),
        (2, "on", GPU, 10**10, True),
    ],
)
def test_small_models_that_are_whole_on_a_gpu_are_launched_as_graphs(
    stage: int, wanted: str, device: torch.device, weights: int, expected: bool
) -> None:
    config = config_of(stage, cuda_graphs=wanted)
    model = torch.nn.Linear(weights, 1, bias=False, device="meta")
    ds_config = {"zero_optimization": {"stage": stage}}
    assert use_graphs(config, ds_config, model, device) is expected


@pytest.mark.parametrize(("stage", "device"), [(3, GPU), (2, CPU)])
def test_graphs_where_they_cannot_be_are_refused(stage: int, device: torch.device) -> None:
    config, ds_config = config_of(stage, cuda_graphs="on"), {"zero_optimization": {"stage": stage}}
    with pytest.raises(
        ConfigError, match=r"train.cuda_graphs = on .* use train.cuda_graphs = auto"
    ):
        use_graphs(config, ds_config, torch.nn.Linear(2, 2), device)


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_lensnet_is_the_same_function(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    compiled: list[Any] = []
    inner = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or inner(f, **how))
    mc = mc_config()
    net, (lods, starts) = model(run_config(mc)), plan(mc, 2)
    output = net(tokens(mc, 2), lods, starts, torch.ones(2, mc.horizon_tokens))
    lens = wake(LensNet(mc, dim=32))
    results = []
    for turn in range(2):
        if turn:
            compile_lensnet(lens, whole=whole)
        scores = lens(output.visible_entries, lods, starts, output.lod0)
        gradients = torch.autograd.grad(scores.square().sum(), list(lens.parameters()))
        results.append((scores, *gradients))
    assert compiled == [lens.row_scores if whole else transformer_block]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("frozen", ["none", "backbone", "all"])
@pytest.mark.parametrize("size", [10, 10**9])
def test_a_bucket_is_no_larger_than_what_learns(
    size: int, frozen: Frozen, single_process: torch.device
) -> None:
    config = config_of(3)
    ds_config = resolve_deepspeed_config(config, 1, "cpu")
    ds_config["zero_optimization"]["reduce_bucket_size"] = size
    model = build_sharded_model(config, ds_config, vocab_size=VOCAB)
    freeze(model, frozen)
    learning = sum(p.ds_numel for p in model.parameters() if p.requires_grad)
    assert 10 < learning < 10**9
    engine = build_engine(config, ds_config, model, single_process)
    assert engine.optimizer.reduce_bucket_size == min(size, learning)
