"""DeepSpeed configs: what is derived, what is refused, and that every stage trains and skips
steps that are not finite.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mc_ds.config import ConfigError, RunConfig
from mc_ds.training.engine.deepspeed_config import (
    BUCKET_OF_ONE_RANK,
    accumulation_steps,
    resolve_deepspeed_config,
)
from tests.support.processes import ROOT, inherited
from tests.support.tiny_run import TIMEOUT_S

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
ZERO = {"stage": 3}


def run_config(path, **train):
    return RunConfig.model_validate({"deepspeed_config": str(path), "train": train})


@pytest.fixture
def resolve(tmp_path):
    """Resolves a JSON made of keywords for 2 ranks on a CPU, global batch 8, micro batch 1,
    fp32.
    """

    def call(device_type="cpu", **content):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": ZERO, **content}))
        return resolve_deepspeed_config(run_config(path), 2, device_type)

    return call


def refusal(resolve, **content):
    with pytest.raises(ConfigError) as caught:
        resolve(**content)
    message = str(caught.value)
    assert "\n" not in message
    return message.split("ds.json: ", 1)[-1]


def test_batch_clipping_and_precision_come_from_the_recipe(resolve):
    on_cpu, on_gpu = resolve(), resolve("cuda")
    assert (
        on_cpu["train_batch_size"],
        on_cpu["train_micro_batch_size_per_gpu"],
        on_cpu["gradient_accumulation_steps"],
    ) == (8, 1, 4)
    assert on_cpu["gradient_clipping"] == 1.0
    assert (on_cpu["bf16"]["enabled"], on_gpu["bf16"]["enabled"]) == (False, True)
    assert on_cpu["bf16"]["check_grad_overflow"] is True


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_does_not_wait_for_a_reduction(tmp_path, stage, ranks):
    """DeepSpeed waits for the device after an overlapped reduction, and for its throughput
    timer.
    """
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": True}}))
    resolved = resolve_deepspeed_config(run_config(path), ranks, "cuda")
    assert resolved["zero_optimization"]["overlap_comm"] is (ranks > 1)
    assert resolved["timers"] == {"throughput": {"enabled": False}}


def test_one_rank_keeps_no_persistent_parameters_and_no_large_bucket(tmp_path):
    """DeepSpeed gathers them after each step and waits for the device."""
    zero = {"stage3_param_persistence_threshold": 10_000, "reduce_bucket_size": 10**9}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    several = resolve_deepspeed_config(run_config(path), 2, "cuda")["zero_optimization"]
    assert several.items() >= zero.items()
    alone = resolve_deepspeed_config(run_config(path), 1, "cuda")["zero_optimization"]
    assert alone["stage3_param_persistence_threshold"] == 0
    assert alone["reduce_bucket_size"] == BUCKET_OF_ONE_RANK


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bucket_may_be_given_in_quotation_marks(ranks: int, tmp_path: Path) -> None:
    """As DeepSpeed reads it."""
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "1000"}}')
    resolved = resolve_deepspeed_config(run_config(path), ranks, "cuda")
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 1000


def test_gradients_of_several_ranks_are_added_up_in_fp32(resolve, tmp_path):
    assert resolve(communication_data_type="bf16")["communication_data_type"] == "bf16"
    assert resolve(communication_data_type="auto")["communication_data_type"] == "fp32"
    assert resolve()["communication_data_type"] == "fp32"
    alone = resolve_deepspeed_config(run_config(tmp_path / "ds.json"), 1, "cuda")
    assert "communication_data_type" not in alone  # nothing is added up


def slope_of_a_ring(dtype, ranks=512, elements=4096):
    """The slope on the true mean of a sum in `dtype` to which one rank after the other adds its
    gradient: a mean of 1 to 2 and noise of deviation 0.5.
    """
    generator = torch.Generator().manual_seed(0)
    mean = 1 + torch.rand(elements, generator=generator, dtype=torch.float64)
    total, exact = torch.zeros(elements, dtype=dtype), torch.zeros_like(mean)
    for _ in range(ranks):
        noise = torch.randn(elements, generator=generator, dtype=torch.float64)
        gradient = (mean + noise / 2).to(torch.bfloat16)
        exact += gradient.double() / ranks
        total += gradient.to(dtype) / ranks
    return float((total.double() * exact).sum() / (exact * exact).sum())


def test_a_ring_of_512_ranks_keeps_the_mean_in_fp32_and_loses_it_in_bf16(resolve):
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    chosen = dtypes[resolve()["communication_data_type"]]
    assert slope_of_a_ring(chosen) == pytest.approx(1, abs=1e-5)
    assert slope_of_a_ring(torch.bfloat16) < 0.95


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """What two ranks reduce in one bf16 step, by config: the dtypes of tensors with more than a few
    numbers. The config "bf16" asks for bf16.
    """
    folder = tmp_path_factory.mktemp("reduced")
    low = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    (folder / "bf16.json").write_text(json.dumps(low | {"communication_data_type": "bf16"}))
    paths = [*map(str, SHIPPED), str(folder / "bf16.json")]
    worker = str(ROOT / "tests" / "support" / "reduction_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(folder / "meeting"), *paths],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=inherited(),
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    lines = [line for out, _ in said for line in out.splitlines() if line.startswith("RESULT ")]
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    return [(Path(result["path"]).stem, set(result["dtypes"])) for result in found]


def test_every_stage_reduces_gradients_in_the_dtype_of_the_config(reduced):
    assert sorted(reduced, key=lambda result: result[0]) == sorted(
        [(path.stem, {"torch.float32"}) for path in SHIPPED for _ in range(2)]
        + [("bf16", {"torch.bfloat16"})] * 2,
        key=lambda result: result[0],
    )


def test_what_agrees_and_what_is_auto_is_accepted(resolve):
    given = dict(
        train_batch_size=8,
        gradient_accumulation_steps="auto",
        gradient_clipping=1,
        bf16={"enabled": "auto"},
    )
    assert (
        resolve(**given, steps_per_print="auto", fp16={"enabled": False}, scheduler=None)
        == resolve()
    )


def test_other_keys_pass_through(resolve):
    zero = {"stage": 2, "reduce_bucket_size": 1000, "log_trace_cache_warnings": True}
    resolved = resolve(
        zero_optimization=zero, wall_clock_breakdown=True, bf16={"immediate_grad_update": True}
    )
    assert resolved["zero_optimization"] == zero
    assert resolved["wall_clock_breakdown"] is True
    assert resolved["bf16"]["immediate_grad_update"] is True


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            dict(train_batch_size=16),
            "train_batch_size = 16 contradicts 8 from train.global_batch_size: remove it",
        ),
        (dict(train_micro_batch_size_per_gpu=2), "contradicts 1 from train.micro_batch_size"),
        (dict(gradient_accumulation_steps=1), "contradicts 4 from the batch sizes on 2 ranks"),
        (
            dict(gradient_clipping=0.5),
            "gradient_clipping = 0.5 contradicts 1.0 from train.grad_clip",
        ),
        (
            dict(bf16={"enabled": True}),
            "bf16.enabled = true contradicts false from train.precision (fp32 on cpu)",
        ),
        (
            dict(bf16={"check_grad_overflow": False}),
            "bf16.check_grad_overflow = false contradicts true",
        ),
        (
            dict(optimizer={"type": "Adam"}),
            "optimizer cannot be set in the JSON: the trainer makes the optimizer, AdamW",
        ),
        (
            dict(scheduler={"type": "WarmupLR"}),
            "scheduler cannot be set in the JSON: the trainer sets the learning rate",
        ),
        (dict(fp16={"enabled": True}), "fp16 is not supported: set train.precision"),
        (dict(activation_checkpointing={}), "set train.activation_checkpointing"),
        (
            dict(zero_optimisation={}),
            "unknown key zero_optimisation: did you mean zero_optimization?",
        ),
        (
            dict(zero_optimization={"stage": 3, "overlap_com": True}),
            "unknown key overlap_com: did you mean overlap_comm?",
        ),
        (
            dict(zero_optimization={"stage": 3, "reduce_bucket_size": -1}),
            "reduce_bucket_size = -1: should be greater than 0",
        ),
        (dict(zero_optimization={"stage": 0}), "zero_optimization.stage = 0: use 1, 2 or 3"),
        (dict(zero_optimization=True), "zero_optimization.stage = None: use 1, 2 or 3"),
        (
            dict(zero_optimization={"stage": 2, "compute_grad_norm": False}),
            "compute_grad_norm = false",
        ),
        (
            dict(zero_optimization={"stage": 2, "round_robin_gradients": True}),
            "round_robin_gradients = true",
        ),
        (
            dict(
                zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu"}},
                zero_force_ds_cpu_optimizer=True,
            ),
            "zero_force_ds_cpu_optimizer = true: should be false",
        ),
    ],
)
def test_what_contradicts_is_refused(resolve, content, expected):
    assert expected in refusal(resolve, **content)


def test_an_indivisible_batch_names_the_nearest_ones():
    with pytest.raises(ConfigError, match=r"global_batch_size = 8 .* 3 ranks = 6: use 6 or 12$"):
        accumulation_steps(run_config("x.json", micro_batch_size=2), 3)
    with pytest.raises(ConfigError, match=r"16 ranks = 16: use 16$"):
        accumulation_steps(run_config("x.json"), 16)
    assert accumulation_steps(run_config("x.json", micro_batch_size=2), 2) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not a JSON file"),
        ("[]", "should be a JSON object"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path, text, expected):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        resolve_deepspeed_config(run_config(tmp_path / "ds.json"), 1, "cpu")


def test_a_missing_file_names_those_there_are():
    with pytest.raises(ConfigError, match=r"zero4\.json.*cannot read it.*zero3_offload\.json"):
        resolve_deepspeed_config(run_config(ROOT / "ds_configs" / "zero4.json"), 1, "cpu")


def test_the_shipped_files_leave_the_derived_keys_out():
    assert [path.stem for path in SHIPPED] == ["zero1", "zero2", "zero3", "zero3_offload"]
    for path in SHIPPED:
        derived = resolve_deepspeed_config(run_config(path), 2, "cuda")
        assert set(derived) - set(json.loads(path.read_text())) >= {
            "train_batch_size",
            "gradient_clipping",
            "bf16",
        }
        assert derived["zero_optimization"]["stage"] == int(path.stem[4])


@pytest.fixture(scope="module")
def trained():
    """Results of training with every shipped config, by (name, precision)."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "deepspeed_worker.py"),
        *map(str, SHIPPED),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=inherited()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [
        json.loads(line.removeprefix("RESULT "))
        for line in done.stdout.splitlines()
        if line.startswith("RESULT ")
    ]
    return {(Path(result["path"]).stem, result["precision"]): result for result in results}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [path.stem for path in SHIPPED])
def test_every_stage_trains_and_skips_steps_that_are_not_finite(trained, name, precision):
    result = trained[name, precision]
    assert result["applied"] == result["changed"] == [True, False, True, False, True]
    assert result["skipped"] == 2
    assert result["finite"]
