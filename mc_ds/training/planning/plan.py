"""Finds the fastest way to train a config on given GPUs: ZeRO stage, micro-batch, accumulation,
activation checkpointing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mc_ds.config import ConfigError, RunConfig
from mc_ds.training.planning.estimate import GIB, largest_shapes, memory_per_rank
from mc_ds.training.planning.hardware import Hardware
from mc_ds.training.planning.time import StepTime, step_time
from mc_ds.training.planning.work import work_per_sequence

USABLE = 0.92
"""Usable share of a GPU's memory. The allocator reserves 6 to 9 % more than the peak, and the
driver needs some.
"""
STAGES = (1, 2, 3)
RECOMPUTED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Values of `train.activation_checkpointing` that are tried."""


@dataclass(frozen=True)
class Plan:
    """One way to run a config, with its estimated cost."""

    config: RunConfig
    """The config, with the plan's micro-batch size and activation checkpointing."""
    stage: int
    """ZeRO stage."""
    micro_steps: int
    """Micro-steps per optimizer step."""
    memory: Mapping[str, float]
    """Bytes per rank, by purpose."""
    time: StepTime

    @property
    def tokens_per_step(self) -> int:
        """Tokens T of all sequences in one optimizer step, over all ranks."""
        return self.config.train.global_batch_size * self.config.mc.seq_len


def best_plan(config: RunConfig, counts: Mapping[str, int], hardware: Hardware, ranks: int) -> Plan:
    """Return the fastest plan that fits into memory.

    Ties go to the lowest ZeRO stage, then the smallest micro-batch, then the smallest share of
    recomputed blocks. `counts` are parameters per module. Raises ConfigError if the global batch is
    not a multiple of `ranks`, or if no plan fits.
    """
    batch = config.train.global_batch_size
    if batch % ranks:
        raise ConfigError(
            f"train.global_batch_size = {batch} is not a multiple of {ranks} GPUs: use a multiple"
            f" of {ranks}"
        )
    plans = list(_plans(config, counts, hardware, ranks))
    fitting = [plan for plan in plans if _total(plan) <= USABLE * hardware.memory_gib * GIB]
    if not fitting:
        least = min(plans, key=_total)
        raise ConfigError(
            f"{ranks} {hardware.name} with {hardware.memory_gib:g} GiB each are too few: a rank"
            f" needs at least {_total(least) / GIB:.0f} GiB (ZeRO-{least.stage}, micro-batch 1,"
            " activation checkpointing): use more GPUs, offloading, or a smaller model"
        )
    return min(fitting, key=lambda plan: plan.time.total)


def _plans(
    config: RunConfig, counts: Mapping[str, int], hardware: Hardware, ranks: int
) -> Iterator[Plan]:
    per_rank = config.train.global_batch_size // ranks
    sequence = work_per_sequence(config, largest_shapes(config)["W"])
    for stage in STAGES:
        for micro_batch in (size for size in range(1, per_rank + 1) if per_rank % size == 0):
            for share in RECOMPUTED:
                changed = {
                    "micro_batch_size": micro_batch,
                    "activation_checkpointing": share,
                }
                tried = config.model_copy(update={"train": config.train.model_copy(update=changed)})
                micro_steps = per_rank // micro_batch
                time = step_time(
                    tried,
                    sequence,
                    counts,
                    hardware,
                    ranks=ranks,
                    stage=stage,
                    micro_steps=micro_steps,
                )
                memory = memory_per_rank(tried, counts, ranks, stage, precision="bf16")
                yield Plan(tried, stage, micro_steps, memory, time)


def _total(plan: Plan) -> float:
    return sum(plan.memory.values())
