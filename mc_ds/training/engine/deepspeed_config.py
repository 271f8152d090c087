"""Makes the complete DeepSpeed config of a run from a DeepSpeed JSON and a `RunConfig`.

The JSON controls sharding, offloading and communication. Batch size, precision, clipping, optimizer
and schedule come from the `RunConfig`; a JSON that contradicts it is an error. "auto" in the JSON
means the `RunConfig`'s value, or else DeepSpeed's default.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mc_ds.config.errors import ConfigError, unknown_key, validation_error
from mc_ds.config.run import RunConfig

SUPPORTED_KEYS = frozenset(
    {
        *("zero_optimization", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"),
        *(
            "data_types",
            "communication_data_type",
            "prescale_gradients",
            "gradient_predivide_factor",
        ),
        *(
            "aio",
            "checkpoint",
            "disable_python_gc",
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
        ),
        *(
            "log_level",
            "timers",
            "flops_profiler",
            "comms_logger",
            "tensorboard",
            "csv_monitor",
            "wandb",
            "comet",
        ),
    }
)
"""Keys that a JSON may set freely. Others are errors, because DeepSpeed silently ignores unknown
keys, also misspelled ones.
"""

REFUSED_KEYS = {
    "optimizer": (
        "the trainer makes the optimizer, AdamW: set train.learning_rate, train.weight_decay, ..."
        " and remove the block"
    ),
    "scheduler": (
        "the trainer sets the learning rate: set train.schedule and train.warmup_steps and remove"
        " the block"
    ),
    "activation_checkpointing": (
        "the trainer has its own activation checkpointing: set train.activation_checkpointing and"
        " remove the block"
    ),
    "fp16": "fp16 is not supported: set train.precision to bf16 or fp32 and remove the block",
    "amp": "set train.precision to bf16 or fp32 and remove the block",
    "torch_autocast": "set train.precision to bf16 or fp32 and remove the block",
}


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Return micro-steps per optimizer step: global batch / (micro-batch * ranks).

    Raises ConfigError if that is not an integer.
    """
    per_micro_step = config.train.micro_batch_size * world_size
    steps, rest = divmod(config.train.global_batch_size, per_micro_step)
    if rest or not steps:
        near = " or ".join(str(n * per_micro_step) for n in (steps, steps + 1) if n)
        raise ConfigError(
            f"train.global_batch_size = {config.train.global_batch_size} is not a multiple of"
            f" train.micro_batch_size = {config.train.micro_batch_size} times {world_size} ranks ="
            f" {per_micro_step}: use {near}"
        )
    return steps


def resolve_deepspeed_config(
    config: RunConfig, world_size: int, device_type: str
) -> dict[str, Any]:
    """Return the complete DeepSpeed config of a run of `world_size` ranks on `device_type` ("cuda",
    "cpu").

    It makes the engine skip every optimizer step with a non-finite gradient norm, in all stages, in
    fp32 and bf16: `engine.was_step_applied()` is then False on all ranks. Raises ConfigError if the
    JSON is invalid or contradicts `config`, or if `train.precision` is fp8 without such a device.
    """
    path = config.deepspeed_config
    given = _read(path)
    stage = _check_zero(path, given)
    _check_offload(path, given)
    precision = config.train.precision_on(device_type)
    if config.train.precision == "fp8":
        _require_fp8(device_type)
    accumulation = accumulation_steps(config, world_size)
    owned = {
        "train_batch_size": (config.train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (config.train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, f"the batch sizes on {world_size} ranks"),
        "gradient_clipping": (config.train.grad_clip, "train.grad_clip"),
    }
    for key, (value, origin) in owned.items():
        _agree(path, key, given.pop(key, value), value, origin)
    bf16 = given.pop("bf16", {})
    if not isinstance(bf16, dict):
        raise ConfigError(f"{path}: bf16 = {bf16!r}: should be a JSON object, or left out")
    _agree(
        path,
        "bf16.enabled",
        bf16.get("enabled", "auto"),
        precision == "bf16",
        f"train.precision ({precision} on {device_type})",
    )
    _agree(
        path,
        "bf16.check_grad_overflow",
        bf16.get("check_grad_overflow", True),
        True,
        "the trainer, which skips steps with non-finite gradients",
    )
    zero = {**given["zero_optimization"], "stage": stage}
    if "reduce_bucket_size" in zero:  # DeepSpeed also takes numbers in quotation marks
        zero["reduce_bucket_size"] = int(float(zero["reduce_bucket_size"]))
    if stage == 3:
        # DeepSpeed's replacement of F.linear depends on each parameter's identity, so that compiled
        # blocks would be recompiled for every layer.
        _agree(
            path,
            "zero_optimization.memory_efficient_linear",
            zero.get("memory_efficient_linear", "auto"),
            False,
            "the trainer, which compiles blocks",
        )
        zero["memory_efficient_linear"] = False
        if world_size == 1:  # nothing is sharded, and DeepSpeed would synchronise after each step
            zero["stage3_param_persistence_threshold"] = 0
            given_size = zero.get("reduce_bucket_size", BUCKET_OF_ONE_RANK)
            zero["reduce_bucket_size"] = min(given_size, BUCKET_OF_ONE_RANK)
    elif world_size == 1:  # there is nothing to overlap, and DeepSpeed would synchronise
        zero["overlap_comm"] = False
    if world_size > 1 and given.get("communication_data_type", "auto") == "auto":
        given["communication_data_type"] = "fp32"  # sums over many ranks lose precision in bf16
    given.setdefault("timers", {"throughput": {"enabled": False}})  # it synchronises twice per step
    for key in given:
        if key not in SUPPORTED_KEYS:
            raise unknown_key(key, {*SUPPORTED_KEYS, *owned, "bf16"}, source=path)
    return {
        **{key: value for key, value in given.items() if value != "auto"},
        **{key: value for key, (value, _) in owned.items()},
        "zero_optimization": zero,
        # The trainer passes torch's AdamW, also with offloading.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {**bf16, "enabled": precision == "bf16", "check_grad_overflow": True},
    }


BUCKET_OF_ONE_RANK = 50_000_000
"""Elements of ZeRO-3's bucket of gradients on a single rank, which reduces nothing; DeepSpeed
allocates it all the same.
"""

FP8_CAPABILITY = (8, 9)
"""The lowest compute capability with FP8 tensor cores (Ada)."""


def _require_fp8(device_type: str) -> None:
    """Raise ConfigError if `device_type` has no FP8 products."""
    found = "a CPU"
    if device_type == "cuda":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= FP8_CAPABILITY:
            return
        major, minor = torch.cuda.get_device_capability()
        found = f"{torch.cuda.get_device_name()} of compute capability {major}.{minor}"
    raise ConfigError(
        "train.precision = fp8 needs a GPU of compute capability 8.9 or above, and this is"
        f" {found}: use train.precision = auto"
    )


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        here = sorted(str(p) for p in Path(path).parent.glob("*.json"))
        remedy = (
            f"use one of {', '.join(here)}"
            if here
            else f"there is no JSON file in {Path(path).absolute().parent}"
        )
        raise ConfigError(
            f"deepspeed_config = {path!r}: cannot read it ({error.strerror}): {remedy}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"deepspeed_config = {path!r}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"deepspeed_config = {path!r}: contains a {type(content).__name__}; should be a JSON"
            " object"
        )
    for key, reason in REFUSED_KEYS.items():
        block = content.pop(key, None)
        if block is not None and not (
            isinstance(block, dict) and block.get("enabled", True) in (False, "auto")
        ):
            raise ConfigError(f"{path}: {key} cannot be set in the JSON: {reason}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"duplicate key {next(name for name in names if names.count(name) > 1)!r}: keep one of"
            " them"
        )
    return content


def _check_zero(path: str, given: dict[str, Any]) -> int:
    """Return the ZeRO stage. Raises ConfigError if the section `zero_optimization` is invalid."""
    zero = given.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        stage = zero.get("stage") if isinstance(zero, dict) else None
        raise ConfigError(
            f"{path}: zero_optimization.stage = {stage!r}: use 1, 2 or 3 (0 does not skip steps"
            " with non-finite gradients)"
        )
    # Importing DeepSpeed takes seconds.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        raise validation_error(
            error, DeepSpeedZeroConfig, source=f"{path}: zero_optimization"
        ) from error
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(
            f"{path}: zero_optimization.compute_grad_norm = false: should be true, because"
            " clipping, metrics and skipping of bad steps need the norm"
        )
    if zero.get("round_robin_gradients"):
        # DeepSpeed would record wrong offsets of parameters, which its converter uses.
        raise ConfigError(
            f"{path}: zero_optimization.round_robin_gradients = true: should be false, because"
            " resuming with another number of ranks would mix up weights"
        )
    return int(zero["stage"])


def _check_offload(path: str, given: dict[str, Any]) -> None:
    forced = given.get("zero_force_ds_cpu_optimizer")
    if forced is True and "offload_optimizer" in given["zero_optimization"]:
        raise ConfigError(
            f"{path}: zero_force_ds_cpu_optimizer = true: should be false, because the trainer uses"
            " torch's AdamW"
        )


def _agree(path: str, key: str, given: Any, derived: Any, origin: str) -> None:
    if given != "auto" and given != derived:
        raise ConfigError(
            f"{path}: {key} = {json.dumps(given)} contradicts {json.dumps(derived)} from {origin}:"
            ' remove it or use "auto"'
        )
