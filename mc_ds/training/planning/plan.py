"""The fastest way to train a configuration on given GPUs: ZeRO stage, micro-batch, recomputation,
accumulation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mc_ds.config import ConfigError, RunConfig
from mc_ds.training.estimate import GIB, largest_shapes, memory_per_rank
from mc_ds.training.planning.hardware import Hardware
from mc_ds.training.planning.time import StepTime, step_time
from mc_ds.training.planning.work import work_per_sequence

USABLE = 0.92
"""Share of a GPU's memory that may be planned with: the allocator reserves 6 to 9 % more than the
peak, the driver takes some.
"""
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Plan:
    """One way to run, and what it should cost."""

    config: RunConfig
    """The run with its micro-batch and recomputation."""
    stage: int
    micro_steps: int
    memory: Mapping[str, float]
    """Bytes per rank, by what they hold."""
    time: StepTime

    @property
    def tokens_per_step(self) -> int:
        """Original tokens of one optimizer step on all ranks."""
        return self.config.train.global_batch_size * self.config.mc.seq_len


def best_plan(config: RunConfig, counts: Mapping[str, int], hardware: Hardware, ranks: int) -> Plan:
    """Return the plan with the least time per step; of equal ones the lowest stage, then the
    smallest micro-batch, without recomputation.

    `counts` are parameters per module. Raises ConfigError where the global batch cannot be shared
    by the ranks, or where nothing fits the memory.
    """
    batch = config.train.global_batch_size
    if batch % ranks:
        raise ConfigError(
            f"train.global_batch_size = {batch} sequences cannot be shared by {ranks} GPUs: use a"
            f" multiple of {ranks}"
        )
    plans = list(_plans(config, counts, hardware, ranks))
    fitting = [plan for plan in plans if _total(plan) <= USABLE * hardware.memory_gib * GIB]
    if not fitting:
        least = min(plans, key=_total)
        raise ConfigError(
            f"{ranks} {hardware.name} with {hardware.memory_gib:g} GiB each are too few: the least"
            f" that a rank needs is {_total(least) / GIB:.0f} GiB (ZeRO-{least.stage}, micro-batch"
            " 1, recomputation): use more GPUs, offloading, or a smaller model"
        )
    return min(fitting, key=lambda plan: plan.time.total)


def _plans(
    config: RunConfig, counts: Mapping[str, int], hardware: Hardware, ranks: int
) -> Iterator[Plan]:
    per_rank = config.train.global_batch_size // ranks
    sequence = work_per_sequence(config, largest_shapes(config)["W"])
    for stage in STAGES:
        for micro_batch in (size for size in range(1, per_rank + 1) if per_rank % size == 0):
            for recompute in (False, True):
                changed = {
                    "micro_batch_size": micro_batch,
                    "activation_checkpointing": recompute,
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
