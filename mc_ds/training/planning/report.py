"""The planner's report: the chosen plan with its memory, communication and time."""

from collections.abc import Iterator, Mapping

from mc_ds.config import RunConfig
from mc_ds.training.planning.estimate import GIB, REPLICATED, largest_shapes
from mc_ds.training.planning.hardware import Hardware
from mc_ds.training.planning.plan import USABLE, Plan, best_plan
from mc_ds.training.planning.time import StepTime
from mc_ds.training.planning.work import parameter_counts, shares

TOKENS_PER_PARAMETER = 20
"""Compute-optimal number of training tokens (Hoffmann et al., 2022)."""


def plan_report(
    config: RunConfig, hardware: Hardware, ranks: int, *, tokens: float | None = None
) -> str:
    """Return the report on the fastest plan that fits.

    `tokens` is the number of training tokens, by default 20 per backbone parameter.
    Raises ConfigError if no plan fits.
    """
    counts = parameter_counts(config)
    plan = best_plan(config, counts, hardware, ranks)
    backbone = sum(count for name, count in counts.items() if name not in ("gistnet", REPLICATED))
    budget = tokens or TOKENS_PER_PARAMETER * backbone
    sections = (
        ("Model", _model(counts)),
        (f"Plan for {ranks} {hardware.name}", _choice(plan, hardware)),
        ("Memory per GPU", _memory(plan, hardware)),
        ("Time per step", _time(plan.time)),
        (f"{budget:,.0f} tokens", _budget(plan, hardware, ranks, budget)),
    )
    text = "\n".join(f"# {title}\n" + "\n".join(lines) + "\n" for title, lines in sections)
    return text + "\nThese are estimates, fitted to the runs in docs/experiments/planner.md.\n"


def _model(counts: Mapping[str, int]) -> Iterator[str]:
    for name, count in {**counts, "total": sum(counts.values())}.items():
        yield f"  {name:<16}{count / 1e9:>10.3f} B parameters"


def _choice(plan: Plan, hardware: Hardware) -> Iterator[str]:
    train, mc = plan.config.train, plan.config.mc
    shapes = largest_shapes(plan.config)
    yield f"  ZeRO-{plan.stage}, micro-batch {train.micro_batch_size}, " + (
        f"accumulation {plan.micro_steps}, activation checkpointing"
        f" {_recomputed(train.activation_checkpointing)}"
    )
    yield (
        f"  {train.global_batch_size} sequences of {mc.seq_len:,} tokens per step, each as"
        f" {shapes['G']} rows of {shapes['W']:,} entries"
    )
    yield (
        f"  bandwidth per GPU: {hardware.link_gb_s:g} GB/s within a host of {hardware.per_host},"
        f" {hardware.network_gb_s:g} GB/s between hosts"
    )


def _recomputed(share: float) -> str:
    return f"of {100 * share:g} % of the blocks" if share else "off"


def _memory(plan: Plan, hardware: Hardware) -> Iterator[str]:
    for name, size in plan.memory.items():
        yield f"  {name:<16}{size / GIB:>10.1f} GiB"
    total = sum(plan.memory.values()) / GIB
    yield (f"  {'total':<16}{total:>10.1f} GiB of {USABLE * hardware.memory_gib:.1f} usable")


def _time(time: StepTime) -> Iterator[str]:
    parts = {
        "networks": time.networks,
        "LensNet": time.lensnet,
        "communication": time.communication,
        "optimizer": time.optimizer,
        "total": time.total,
    }
    for name, seconds in parts.items():
        yield f"  {name:<16}{seconds * 1e3:>10.1f} ms{seconds / time.total:>8.1%}"
    yield (
        f"  each GPU sends {time.sent / 1e9:,.1f} GB; communication is the part that does not"
        " overlap with computation"
    )
    of = ", ".join(f"{name} {share:.1%}" for name, share in shares(time.work).items())
    yield f"  operations: {of}"


def _budget(plan: Plan, hardware: Hardware, ranks: int, tokens: float) -> Iterator[str]:
    seconds = plan.time.total
    rate = plan.tokens_per_step / seconds
    days = tokens / rate / 86400
    yield f"  {rate / ranks:,.0f} tokens/s per GPU, {rate:,.0f} in total"
    yield f"  MFU {plan.time.mfu(hardware):.1%}"
    yield (
        f"  {tokens / plan.tokens_per_step:,.0f} steps, {days:,.2f} days,"
        f" {days * 24 * ranks:,.0f} GPU-hours"
    )
