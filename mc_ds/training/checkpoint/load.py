"""Resuming: checks that a checkpoint fits the config, converts it if ranks or ZeRO stage have
changed, and loads it.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mc_ds.training.checkpoint.universal import is_converted
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.ranks.agreement import gather, on_main, rank_and_world
from mc_ds.weights.checkpoint.folder import CONVERTED
from mc_ds.weights.checkpoint.screen import problem_of_pickles, refusal
from mc_ds.weights.checkpoint.shards import LENS
from mc_ds.weights.checkpoint.trainer import read_trainer
from mc_ds.weights.compatibility import require_match

POLL_S = 5.0
"""Seconds between collectives while rank 0 converts, because a conversion may take longer than the
collectives' timeout.
"""


@dataclass(frozen=True)
class ResumePlan:
    """The checkpoint that a run resumes from, and how to load it."""

    checkpoint: Path
    trainer: dict[str, Any]
    """The content of `trainer.json`."""
    shards: Path
    """Folder that DeepSpeed loads: the checkpoint or its conversion."""
    resized: bool = False
    """True if the checkpoint is sharded differently; frozen parameters are then loaded one
    by one.
    """

    @property
    def converted(self) -> bool:
        """Whether the engine must be built to load a universal checkpoint."""
        return self.shards != self.checkpoint

    @property
    def for_engine(self) -> bool:
        """Whether the engine has anything to load. False if the whole model is frozen and the
        checkpoint is sharded differently.
        """
        return self.converted or not self.resized


class Sharding(NamedTuple):
    """How optimizer state is partitioned. Loading it with another partition needs a conversion."""

    world_size: int
    zero_stage: int
    sub_group_size: int | None
    """Elements of a sub-group in stage 3; None in other stages."""

    @classmethod
    def of(cls, ds_config: Mapping[str, Any], world_size: int) -> "Sharding":
        """Return the sharding of an engine with a resolved DeepSpeed config."""
        zero = ds_config["zero_optimization"]
        size = zero.get("sub_group_size", "auto")
        if size == "auto":
            size = DeepSpeedZeroConfig.model_fields["sub_group_size"].default
        return cls(world_size, int(zero["stage"]), int(size) if zero["stage"] == 3 else None)

    def words(self, other: "Sharding") -> str:
        """Return a phrase for the sharding, with sub-groups only if all else equals `other`."""
        groups = f", sub-groups of {self.sub_group_size:,}" if self.sub_group_size else ""
        same = self[:2] == other[:2]
        ranks = f"{self.world_size} rank{'s' * (self.world_size != 1)}"
        return f"{ranks} with ZeRO-{self.zero_stage}{groups if same else ''}"


def plan_resume(
    checkpoint: Path,
    mine: Mapping[str, Any],
    *,
    sharding: Sharding,
    cache: Path,
    trusted: bool = False,
) -> ResumePlan:
    """Check a verified checkpoint against this run's requirements `mine`, and convert it if it is
    sharded differently.

    A collective. Conversions are kept in `cache` and reused. Files that DeepSpeed unpickles are
    screened first, unless `trusted`. Raises ConfigError if the checkpoint does not fit the config
    or could run code, and RunStopped if the conversion fails.
    """
    trainer = on_main(lambda: read_trainer(checkpoint))
    require_match(checkpoint, trainer["requirements"], mine)
    _screen_together(checkpoint, trusted)
    written = Sharding(*(trainer[name] for name in Sharding._fields))
    if written == sharding:
        return ResumePlan(checkpoint, trainer, checkpoint)
    if mine["train.frozen"] == "all":  # there is no optimizer state to convert
        return ResumePlan(checkpoint, trainer, checkpoint, resized=True)
    folder = cache / f"{checkpoint.name}{CONVERTED}"
    if on_main(lambda: not is_converted(checkpoint, folder)):
        what = f"from {written.words(sharding)} to {sharding.words(written)}"
        _convert_together(checkpoint, folder, what, trusted)
    _screen_together(folder / checkpoint.name, trusted)
    return ResumePlan(checkpoint, trainer, folder / checkpoint.name, resized=True)


def load_checkpoint(plan: ResumePlan, engine: Any, device: torch.device) -> dict[str, Any] | None:
    """Restore the engine, and return LensNet's state on `device` (None if there is none).

    The optimizer keeps the settings (decay, betas) of this run's config. Frozen parameters are not
    restored from a conversion, which lacks them.
    """
    if plan.for_engine:
        _load_engine(plan, engine)
    lens_file = plan.checkpoint / LENS
    return (
        torch.load(lens_file, map_location=device, weights_only=True)
        if lens_file.exists()
        else None
    )


def _load_engine(plan: ResumePlan, engine: Any) -> None:
    """Restore DeepSpeed's state and torch's random state."""
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in engine.optimizer.param_groups
    ]
    _, client = engine.load_checkpoint(str(plan.shards.parent), tag=plan.shards.name)
    optimizer = engine.optimizer.optimizer
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)
    if plan.converted:
        _separate_step_counts(optimizer)
    torch.set_rng_state(client["torch_rng"].cpu())


def _separate_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a step count of its own.

    DeepSpeed's ZeRO-3 loads one tensor that all groups share, so that each group's step would
    increment it for all.
    """
    on_device = any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    for parameter, state in optimizer.state.items():
        count = torch.as_tensor(state["step"], dtype=torch.float32)
        state["step"] = count.to(parameter.device if on_device else "cpu", copy=True)


def _screen_together(folder: Path, trusted: bool) -> None:
    """Raise ConfigError on all ranks if unpickling a file could run code. Each rank reads a share
    of the files.
    """
    if trusted:
        return
    for problem in gather(problem_of_pickles(folder, *rank_and_world())):
        if problem is not None:
            raise refusal(folder, problem)


def _convert_together(checkpoint: Path, folder: Path, what: str, trusted: bool) -> None:
    """Convert on rank 0, in a separate process, while all ranks wait."""

    def start() -> None:
        print(f"checkpoint {checkpoint}: converting {what}", flush=True)
        module = "mc_ds.training.checkpoint.universal"
        options = ["--trusted"] if trusted else []
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(checkpoint), str(folder), *options],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def finish() -> None:
        (process,) = processes
        _, errors = process.communicate()
        if process.returncode:
            last = [f"exit code {process.returncode}", *errors.strip().splitlines()][-1]
            line = f"cannot convert {checkpoint} {what}: {last}"
            raise RunStopped(line, ExitCode.STORAGE)

    processes: list[subprocess.Popen[str]] = []
    on_main(start)
    while on_main(lambda: _still_runs(processes[0])):
        pass
    on_main(finish)


def _still_runs(process: "subprocess.Popen[str]") -> bool:
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False
