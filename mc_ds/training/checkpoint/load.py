"""Resuming: is this checkpoint one of this config, does it fit these ranks and this ZeRO stage or
must it be converted, and loading it."""

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
from mc_ds.training.ranks.agreement import on_main
from mc_ds.weights.checkpoint.folder import CONVERTED
from mc_ds.weights.checkpoint.shards import LENS
from mc_ds.weights.checkpoint.trainer import read_trainer
from mc_ds.weights.compatibility import require_match

POLL_S = 5.0
"""Ranks hear this often that a conversion goes on, so that it may take longer than a collective's
timeout."""


@dataclass(frozen=True)
class ResumePlan:
    """Where a run continues."""

    checkpoint: Path
    trainer: dict[str, Any]
    """The content of `trainer.json`."""
    shards: Path
    """Folder that DeepSpeed loads: the checkpoint, or its conversion."""
    resized: bool = False
    """Whether it was sharded otherwise: what is frozen must then be loaded parameter by parameter.
    """

    @property
    def converted(self) -> bool:
        """Whether the engine must load a universal checkpoint; it has to know before it is
        built.
        """
        return self.shards != self.checkpoint

    @property
    def for_engine(self) -> bool:
        """Whether the engine has anything to load: not where nothing of the model learns and its
        parts do not fit these ranks."""
        return self.converted or not self.resized


class Sharding(NamedTuple):
    """How a checkpoint's optimizer is cut into pieces: only an engine of the same cut can read it
    as it is."""

    world_size: int
    zero_stage: int
    sub_group_size: int | None
    """Elements of a sub-group of stage 3; None under other stages."""

    @classmethod
    def of(cls, ds_config: Mapping[str, Any], world_size: int) -> "Sharding":
        """Return the sharding of an engine with a resolved DeepSpeed config."""
        zero = ds_config["zero_optimization"]
        size = zero.get("sub_group_size", "auto")
        if size == "auto":
            size = DeepSpeedZeroConfig.model_fields["sub_group_size"].default
        return cls(world_size, int(zero["stage"]), int(size) if zero["stage"] == 3 else None)

    def words(self, other: "Sharding") -> str:
        """Describe it, as far as needed to tell it from another one."""
        groups = f" with sub-groups of {self.sub_group_size:,}" if self.sub_group_size else ""
        same = self[:2] == other[:2]
        ranks = f"{self.world_size} rank{'s' * (self.world_size != 1)}"
        return f"{ranks} under ZeRO-{self.zero_stage}{groups if same else ''}"


def plan_resume(
    checkpoint: Path, mine: Mapping[str, Any], *, sharding: Sharding, cache: Path
) -> ResumePlan:
    """Check a verified checkpoint against this run's requirements, and convert it, once, into
    `cache` where it was sharded otherwise.

    On all ranks together. Raises ConfigError for a checkpoint of another config, RunStopped where
    the conversion fails.
    """
    trainer = on_main(lambda: read_trainer(checkpoint))
    require_match(checkpoint, trainer["requirements"], mine)
    written = Sharding(*(trainer[name] for name in Sharding._fields))
    if written == sharding:
        return ResumePlan(checkpoint, trainer, checkpoint)
    if (
        mine["train.frozen"] == "all"
    ):  # nothing of the model has learned: there is no optimizer's state to convert
        return ResumePlan(checkpoint, trainer, checkpoint, resized=True)
    folder = cache / f"{checkpoint.name}{CONVERTED}"
    if on_main(lambda: not is_converted(checkpoint, folder)):
        what = f"{written.words(sharding)} for {sharding.words(written)}"
        _convert_together(checkpoint, folder, what)
    return ResumePlan(checkpoint, trainer, folder / checkpoint.name, resized=True)


def load_checkpoint(plan: ResumePlan, engine: Any, device: torch.device) -> dict[str, Any] | None:
    """Restore the engine, and return LensNet's state on `device`, or None where the checkpoint has
    none.

    The optimizer's settings (decay, betas) stay those of this run's config. Conversions hold
    nothing of what is frozen.
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
    """Restore what DeepSpeed has saved, and the random state."""
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in engine.optimizer.param_groups
    ]
    _, client = engine.load_checkpoint(str(plan.shards.parent), tag=plan.shards.name)
    optimizer = engine.optimizer.optimizer
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)
    if plan.converted:
        _own_step_counts(optimizer)
    torch.set_rng_state(client["torch_rng"].cpu())


def _own_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its own step count, where its optimizer wants it.

    DeepSpeed's ZeRO-3 puts one tensor into the state of all groups: each group's step would then
    count for all of them.
    """
    on_device = any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    for parameter, state in optimizer.state.items():
        count = torch.as_tensor(state["step"], dtype=torch.float32)
        state["step"] = count.to(parameter.device if on_device else "cpu", copy=True)


def _convert_together(checkpoint: Path, folder: Path, what: str) -> None:
    """Convert on rank 0, in a process of its own; all ranks wait for it."""

    def start() -> None:
        print(f"checkpoint {checkpoint}: converting what was written by {what}", flush=True)
        module = "mc_ds.training.checkpoint.universal"
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(checkpoint), str(folder)],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def finish() -> None:
        (process,) = processes
        _, said = process.communicate()
        if process.returncode:
            last = [f"exit code {process.returncode}", *said.strip().splitlines()][-1]
            line = f"cannot convert {checkpoint}, written by {what}: {last}"
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
