"""The first lines that a run prints: folder, devices, software, model, data and length."""

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mc_ds.config import RunConfig
from mc_ds.training.planning.estimate import largest_shapes
from mc_ds.training.planning.hardware import of_device
from mc_ds.training.planning.time import step_time
from mc_ds.training.planning.work import work_per_sequence
from mc_ds.training.telemetry.progress import duration
from mc_ds.training.telemetry.screen import LOG


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    host: str
    device: str
    """Name of the rank's GPU, or "CPU" with the number of threads."""


def this_place(device: torch.device) -> Place:
    """Return this rank's host and device."""
    threads = torch.get_num_threads()
    on_cpu = f"CPU ({threads} thread{'s' if threads > 1 else ''})"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    return Place(socket.gethostname(), name)


@dataclass(frozen=True)
class Facts:
    """Content of the banner that is not in the config."""

    folder: Path
    places: Sequence[Place]
    """One per rank."""
    zero_stage: int
    precision: str
    versions: Mapping[str, str]
    commit: str | None
    parameters: Mapping[str, int]
    """Number by module."""
    corpus: str
    tokens: tuple[int, int]
    """Tokens for training, and held-out tokens."""
    epochs: Mapping[str, float]
    """How often the run reads each named part of the data."""
    start: Sequence[str]
    """Lines that say where the run starts or resumes, and which settings changed since."""


def banner(config: RunConfig, facts: Facts) -> list[str]:
    """Return the lines of the banner (at most ten if no setting has changed)."""
    mc, train = config.mc, config.train
    length = mc.wc_length_at(0)
    rows = mc.rows_at(length)
    contexts = f"T = {mc.seq_len:,} tokens per sequence"
    if rows > 1:
        contexts += f", as {rows} rows of W = {length:,} entries, K = {mc.block_size}"
    accumulation = train.global_batch_size // (train.micro_batch_size * len(facts.places))
    parts = ", ".join(f"{name} {_short(count)}" for name, count in facts.parameters.items())
    software = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    tokens = train.total_steps * train.global_batch_size * mc.seq_len
    training, held_out = facts.tokens
    epochs = ", ".join(f"{name} {count:.3g}" for name, count in facts.epochs.items())
    return [
        f"run {config.name} in {facts.folder.resolve()} (metrics.jsonl, {LOG}, checkpoints/)",
        f"on {devices(facts.places)}; ZeRO-{facts.zero_stage}, {facts.precision}",
        f"software: {software}, commit {facts.commit or 'unknown'}, process {os.getpid()}",
        f"model: {_short(sum(facts.parameters.values()))} parameters ({parts})",
        f"contexts: {contexts}",
        f"data: {facts.corpus}, {training:,} tokens for training, {held_out:,} held out; mixture "
        + ", ".join(f"{name} {share:g}" for name, share in config.data.tasks.items()),
        f"length: {train.total_steps:,} steps of {train.global_batch_size} sequences"
        f" ({accumulation} micro-steps of {train.micro_batch_size} on each rank), {tokens:,}"
        f" tokens; epochs of the data: {epochs}",
        f"saves {_every(config.checkpoint.interval)}, validates"
        f" {_every(config.validation.eval_interval, none='never')}; {expected_time(config, facts)}",
        *facts.start,
    ]


def expected_time(config: RunConfig, facts: Facts) -> str:
    """Return a phrase with the planner's estimate of the run's time, if it knows the devices.

    The estimate is optimistic: it ignores offloading and slow hosts.
    """
    train, ranks = config.train, len(facts.places)
    kinds = {place.device for place in facts.places}
    hardware = of_device(kinds.pop()) if len(kinds) == 1 else None
    if hardware is None or facts.precision != "bf16" or train.frozen != "none":
        return "progress lines with the time left begin after the second step"
    step = step_time(
        config,
        work_per_sequence(config, largest_shapes(config)["W"]),
        facts.parameters,
        hardware,
        ranks=ranks,
        stage=facts.zero_stage,
        micro_steps=train.global_batch_size // (train.micro_batch_size * ranks),
    )
    at_best = duration(train.total_steps * step.total)
    return f"all steps take at least about {at_best}; the second step gives a measured estimate"


def devices(places: Sequence[Place]) -> str:
    """Return a phrase with the devices of all ranks, grouped by name, and their hosts."""
    counted = Counter(place.device for place in places)
    names = ", ".join(f"{count} x {device}" for device, count in counted.items())
    hosts = list(dict.fromkeys(place.host for place in places))
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts ({hosts[0]} to {hosts[-1]})"
    return f"{len(places)} rank{'s' if len(places) > 1 else ''}: {names} on {where}"


def _short(count: int) -> str:
    """Return a number in its largest unit: `1.24 B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _every(interval: int, *, none: str = "after the last step") -> str:
    return f"every {interval} steps" if interval else none
