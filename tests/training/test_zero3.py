"""Shortcuts through ZeRO-3: the same step as DeepSpeed's, in fewer passes."""

import json
import math
import subprocess
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mc_ds.config import RunConfig
from mc_ds.training.engine import zero3
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config
from mc_ds.training.engine.engine import build_engine, build_sharded_model
from mc_ds.training.engine.zero3 import Factors, adamw, factors
from tests.support.factories import VOCAB, mc_config, plan, run_config, tokens
from tests.support.processes import ROOT, inherited, launcher
from tests.support.tiny_run import TIMEOUT_S

FACTORS = (1.0, 1e4, float("nan"), 1.0, float("inf"), 0.01)
"""Of the loss, by step: most gradients are clipped, two are not finite, the last is small."""


def engine_of(
    device: torch.device, shortcuts: tuple[Any, ...], *, micro_steps: int = 1, **train: Any
) -> tuple[Any, RunConfig]:
    mc = mc_config()
    config = run_config(mc, global_batch_size=2 * micro_steps, micro_batch_size=2, **train)
    config = config.model_copy(update={"deepspeed_config": "ds_configs/zero3.json"})
    ds_config = resolve_deepspeed_config(config, 1, "cpu")
    ds_config["zero_optimization"]["sub_group_size"] = 5000
    model = build_sharded_model(config, ds_config, vocab_size=VOCAB)
    return build_engine(config, ds_config, model, device, shortcuts=shortcuts), config


def take_step(engine: Any, config: RunConfig, step: int) -> None:
    batch = config.train.micro_batch_size
    lods, starts = plan(config.mc, batch)
    micro_steps = engine.gradient_accumulation_steps()
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.01 / (step + 1)
    for micro in range(micro_steps):
        ids = tokens(config.mc, batch, seed=micro_steps * step + micro)
        engine.backward(engine(ids, lods, starts).loss * FACTORS[step])
        engine.step()


def state_of(engine: Any) -> dict[str, list[torch.Tensor]]:
    """Weights in both precisions and AdamW's state, of every sub-group."""
    zero = engine.optimizer
    masters = zero.fp32_partitioned_groups_flat
    states = [zero.optimizer.state[master] for master in masters]
    return {
        "master": [master.detach() for master in masters],
        "low": [low.detach() for low in zero.fp16_partitioned_groups_flat],
        **{key: [state[key] for state in states if state] for key in ("step", *MOMENTS)},
    }


MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compile_", ["off", "on"])
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_steps_are_those_of_deepspeed(
    precision: str,
    compile_: str,
    micro_steps: int,
    single_process: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zero3, "NORM_PIECE", 1000)
    options = dict(precision=precision, compile=compile_, micro_steps=micro_steps)
    ours, config = engine_of(single_process, zero3.SHORTCUTS, **options)
    theirs, _ = engine_of(single_process, (), **options)
    assert len(ours.optimizer.fp16_groups) > 3
    for step in range(len(FACTORS)):
        take_step(ours, config, step)
        take_step(theirs, config, step)
        applied = math.isfinite(FACTORS[step])
        assert ours.was_step_applied() is theirs.was_step_applied() is applied
        norms = [float(engine.get_global_grad_norm()) for engine in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        found, expected = state_of(ours), state_of(theirs)
        for key in ("step", *MOMENTS, "master"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["low"], expected["low"], rtol=2**-7, atol=1e-6)
        for key, values in expected.items():  # a rounding would grow in bf16
            for mine, value in zip(found[key], values, strict=True):
                mine.copy_(value)
    assert (ours.skipped_steps, theirs.skipped_steps) == (2, 2)


def test_gradients_of_one_rank_arrive_exactly(single_process: torch.device) -> None:
    """There is no arithmetic on the way but the sum over micro-steps."""
    options = dict(precision="bf16", micro_steps=3)
    buffers = []
    for shortcuts in (("gradients",), ()):
        engine, config = engine_of(single_process, shortcuts, **options)
        lods, starts = plan(config.mc, 2)
        for micro in range(3):
            engine.backward(engine(tokens(config.mc, 2, seed=micro), lods, starts).loss)
            if micro < 2:
                engine.step()
        buffers.append(engine.optimizer.grad_partitions_flat_buffer.clone())
    assert buffers[0].abs().sum() > 0
    assert torch.equal(*buffers)


@pytest.mark.parametrize("compile_", ["off", "on"])
def test_the_step_leaves_the_gradients_unclipped(
    compile_: str, single_process: torch.device
) -> None:
    """DeepSpeed uses the gradient of a parameter again in steps that do not use the parameter."""
    engine, config = engine_of(single_process, zero3.SHORTCUTS, compile=compile_)
    lods, starts = plan(config.mc, 2)
    engine.backward(engine(tokens(config.mc, 2), lods, starts).loss * 1e4)
    before = engine.optimizer.grad_partitions_flat_buffer.clone()
    engine.step()
    assert before.norm() > 10 * config.train.grad_clip
    assert torch.equal(engine.optimizer.grad_partitions_flat_buffer, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_ranks_take_the_steps_of_deepspeed_however_slowly(device: str) -> None:
    """Gathers of weights wait for the step. On a CPU no step is slow."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [*launcher("torchrun"), "--standalone", "--nproc_per_node", "2"]
    worker = str(ROOT / "tests" / "support" / "zero3_worker.py")
    done = subprocess.run(
        [*command, worker],
        cwd=ROOT,
        env=inherited(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = {
        name: torch.tensor(steps).unbind(1)
        for name, steps in json.loads(result.removeprefix("RESULT ")).items()
    }
    losses, norms = found["deepspeed"]
    tolerance = 1e-3  # of rounding, which weights of the step before would exceed at every step
    assert losses.diff().abs().min() > 5 * tolerance
    assert (norms.diff() / norms[1:]).abs().min() > 5 * tolerance
    for name in ("ours", "slow"):
        torch.testing.assert_close(found[name][0], losses, rtol=0, atol=tolerance)
        torch.testing.assert_close(found[name][1], norms, rtol=tolerance, atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shortcuts", [zero3.SHORTCUTS, ()], ids=str)
def test_gathers_wait_for_the_step_before_them(
    shortcuts: tuple[Any, ...],
    ranks: int,
    single_process: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On GPUs DeepSpeed gathers weights on a stream of its own, which waits for no other. A single
    rank gathers nothing.
    """
    engine, config = engine_of(single_process, ())
    low = engine.optimizer.fp16_partitioned_groups_flat[0]
    before = low.detach().clone()
    waits: list[tuple[Any, bool]] = []

    class Gathers:
        def wait_stream(self, stream: Any) -> None:
            waits.append((stream, torch.equal(low, before)))

    offload = engine.optimizer.parameter_offload
    monkeypatch.setattr(offload, "_DeepSpeedZeRoOffload__allgather_stream", Gathers())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    if ranks > 1:
        monkeypatch.setattr(engine.optimizer, "partition_count", ranks)
    zero3.take_shortcuts(engine.optimizer, compiled=False, shortcuts=shortcuts)
    take_step(engine, config, 0)
    assert waits == ([("current", False)] if ranks > 1 else [])


def test_an_optimizer_without_what_is_replaced_is_refused(single_process: torch.device) -> None:
    engine, _ = engine_of(single_process, ())
    del engine.optimizer.overflow
    with pytest.raises(AssertionError, match=r"DeepSpeed's ZeRO-3 optimizer has no \['overflow'\]"):
        zero3.take_shortcuts(engine.optimizer, compiled=False)


def test_one_compilation_serves_sub_groups_of_all_sizes() -> None:
    torch._dynamo.reset()
    counters.clear()
    update = torch.compile(adamw, dynamic=True, backend="eager")
    numbers = Factors(*torch.full((10,), 0.5).unbind())
    for size in (4096, 777, 33, 100_000):
        tensors = [torch.rand(size + 1)[1:] for _ in range(4)]
        update(*tensors, torch.rand(size).bfloat16(), numbers)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_update_is_that_of_torch(scale: float) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(500))
    optimizer = torch.optim.AdamW([parameter], lr=0.02, betas=(0.8, 0.95), weight_decay=0.3)
    (group,) = optimizer.param_groups
    weights, low = parameter.detach().clone(), torch.zeros(500, dtype=torch.bfloat16)
    moments = torch.zeros(500), torch.zeros(500)
    yes = torch.tensor(True)
    for step in range(1, 6):
        gradient = torch.randn(500)
        parameter.grad = gradient * scale
        optimizer.step()
        numbers = factors(torch.tensor(float(step)), torch.tensor(scale), yes, group)
        adamw(weights, gradient, *moments, low, numbers)
        torch.testing.assert_close(weights, parameter.detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(low, weights.bfloat16())
