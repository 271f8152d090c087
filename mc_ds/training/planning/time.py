"""How long a training step should take: a model of few constants, fitted to measured steps.

    step = micro-steps * (networks + LensNet + exposed communication + gradients) + optimizer

    networks       operations / (peak * efficiency(width)), with the second forward of recomputed
                   blocks; efficiency = 0.80 * width / (width + 900)
    LensNet        8 ms, 0.23 us per node of the trees, operations / (peak * 0.33): small matrices,
                   index vectors, the preference loss
    communication  ZeRO-3 gathers the weights for forward and for backward; ZeRO-2 and 3 reduce the
                   gradients of each micro-step, ZeRO-1 of each step. Two fifths of what could be
                   hidden behind computation show, and all that could not
    gradients      40 bytes of memory traffic per parameter and micro-step
    optimizer      108 bytes of memory traffic per parameter that a rank owns, host included

docs/experiments/planner.md has the steps that the constants were fitted to, and the errors. Not
known to it: slow hosts, other jobs on the network, pauses for checkpoints and validation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mc_ds.config import RunConfig
from mc_ds.training.estimate import REPLICATED
from mc_ds.training.planning.hardware import Hardware
from mc_ds.training.planning.work import Work

CEILING, HALF_WIDTH = 0.80, 900.0
LENS_S, LENS_S_PER_NODE, LENS_EFFICIENCY = 8e-3, 0.23e-6, 0.33
ZERO3_HOOKS = 0.04
"""What hooks and gathers of ZeRO-3 add to computation."""
GRADIENT_BYTES, OPTIMIZER_BYTES = 40.0, 108.0
EXPOSED = 0.4
REDUCED_BYTES = 4.0
"""Gradients are reduced in float32."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every rank, by what they are spent on."""

    networks: float
    lensnet: float
    communication: float
    """Of it, what computation does not hide."""
    optimizer: float
    """The optimizer, and gradients on their way to it."""
    sent: float
    """Bytes that one rank sends and receives, each."""
    work: Work
    """Operations of one rank's step."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.networks + self.lensnet + self.communication + self.optimizer

    def mfu(self, hardware: Hardware) -> float:
        """Return the operations of backbone and GistNet as a share of the peak."""
        return self.work.model / self.total / (hardware.peak_tflops * 1e12)


def efficiency(width: int) -> float:
    """Return the share of the peak that blocks of `width` reach."""
    return CEILING * width / (width + HALF_WIDTH)


def step_time(
    config: RunConfig,
    sequence: Work,
    counts: Mapping[str, int],
    hardware: Hardware,
    *,
    ranks: int,
    stage: int,
    micro_steps: int,
) -> StepTime:
    """Return the time of a step of `micro_steps` micro-steps per rank.

    `sequence` is the work of one sequence, `counts` the parameters per module.
    """
    replicated = counts.get(REPLICATED, 0)
    parameters = sum(counts.values()) - replicated
    work = sequence * config.train.micro_batch_size
    peak = hardware.peak_tflops * 1e12
    again = work.backbone / 3 if config.train.activation_checkpointing else 0.0
    networks = (work.backbone + again) / (peak * efficiency(config.backbone.dim))
    networks += work.gistnet / (peak * efficiency(config.gist_width))
    networks *= 1.0 if stage == 3 else 1 / (1 + ZERO3_HOOKS)
    sent_per_micro_step, sent_per_step = _traffic(parameters, ranks, stage)
    wire = (sent_per_micro_step + sent_per_step / micro_steps) / hardware.bandwidth(ranks)
    exposed = EXPOSED * min(wire, networks) + max(0.0, wire - networks)
    memory = hardware.memory_tb_s * 1e12
    optimizer = OPTIMIZER_BYTES * (parameters / ranks + replicated) / memory
    gradients = GRADIENT_BYTES * (parameters + replicated) / memory
    return StepTime(
        networks=micro_steps * networks,
        lensnet=micro_steps * _lens_time(config, work, peak),
        communication=micro_steps * exposed,
        optimizer=micro_steps * gradients + optimizer,
        sent=micro_steps * sent_per_micro_step + sent_per_step,
        work=work * micro_steps,
    )


def _lens_time(config: RunConfig, work: Work, peak: float) -> float:
    """Return the seconds that LensNet adds to a micro-step."""
    if not work.lensnet:
        return 0.0
    nodes = config.train.micro_batch_size * sum(config.mc.geometry.node_counts)
    return LENS_S + LENS_S_PER_NODE * nodes + work.lensnet / (peak * LENS_EFFICIENCY)


def _traffic(parameters: int, ranks: int, stage: int) -> tuple[float, float]:
    """Return the bytes that a rank sends per micro-step, and once per step."""
    others = (ranks - 1) / ranks
    weights, gradients = 2.0 * parameters * others, REDUCED_BYTES * parameters * others
    if stage == 3:
        return 2 * weights + gradients, 0.0
    if stage == 2:
        return gradients, weights
    return 0.0, 2 * gradients + weights
