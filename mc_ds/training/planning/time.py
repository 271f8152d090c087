"""Predicts the time of a training step, with a few constants fitted to measured steps.

    step = micro-steps * (networks + LensNet + exposed communication + gradients) + optimizer

    networks       operations / (peak * efficiency(width)), including the second forward pass of
                   recomputed blocks; efficiency = 0.80 * width / (width + 740)
    LensNet        0.23 us per tree node + operations / (peak * 0.33), for small matrices, index
                   vectors and the preference loss
    communication  ZeRO-3 gathers the weights for forward and for backward; ZeRO-2 and 3 reduce the
                   gradients of each micro-step, ZeRO-1 of each step. Exposed is all time that
                   exceeds computation, and 0.8 of the time that could overlap with it. Collectives
                   within a host reach 0.45 of the rated bandwidth; between hosts, where nothing
                   was measured, the rated one is assumed
    gradients      50 bytes of memory traffic per parameter and micro-step on their way through the
                   bucket; nothing on a single rank under ZeRO-3
    optimizer      50 bytes of memory traffic per parameter of the rank's shard, with host overhead

docs/experiments/planner.md lists the measured steps and the errors of the fit. Not modelled: slow
hosts, other jobs on the network, pauses for checkpoints and validation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mc_ds.config import RunConfig
from mc_ds.model.backbone.recompute import recomputed_blocks
from mc_ds.training.planning.estimate import REPLICATED
from mc_ds.training.planning.hardware import Hardware
from mc_ds.training.planning.work import Work

CEILING, HALF_WIDTH = 0.80, 740.0
LENS_S_PER_NODE, LENS_EFFICIENCY = 0.23e-6, 0.33
ZERO3_HOOKS = 0.04
"""Overhead of ZeRO-3's hooks and gathers, as a share of the computation."""
GRADIENT_BYTES, OPTIMIZER_BYTES = 50.0, 50.0
EXPOSED, LINK_EFFICIENCY = 0.8, 0.45
REDUCED_BYTES = 4.0
"""Bytes per gradient in reductions (float32)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on each rank, by purpose."""

    networks: float
    """Backbone and GistNet."""
    lensnet: float
    communication: float
    """Only the part that does not overlap with computation."""
    optimizer: float
    """The optimizer, and memory traffic of gradients."""
    sent: float
    """Bytes that a rank sends (and as many that it receives)."""
    work: Work
    """Operations of one rank's step."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.networks + self.lensnet + self.communication + self.optimizer

    def mfu(self, hardware: Hardware) -> float:
        """Return the model FLOPs utilisation: operations/s of backbone and GistNet / the peak."""
        return self.work.model / self.total / (hardware.peak_tflops * 1e12)


def efficiency(width: int) -> float:
    """Return the share of the peak that transformer blocks of `width` reach."""
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

    `sequence` has the operations of one sequence, `counts` the parameters per module.
    """
    replicated = counts.get(REPLICATED, 0)
    parameters = sum(counts.values()) - replicated
    work = sequence * config.train.micro_batch_size
    peak = hardware.peak_tflops * 1e12
    share, backbone = config.train.activation_checkpointing, config.backbone
    again = _recomputation(backbone.num_layers, share)
    gists_again = _recomputation(config.mc.gist_layers, share)
    networks = (1 + again) * work.backbone / (peak * efficiency(backbone.dim))
    networks += (1 + gists_again) * work.gistnet / (peak * efficiency(config.gist_width))
    networks *= 1.0 if stage == 3 else 1 / (1 + ZERO3_HOOKS)
    sent_per_micro_step, sent_per_step = _traffic(parameters, ranks, stage)
    reached = LINK_EFFICIENCY if ranks <= hardware.per_host else 1.0
    wire = (sent_per_micro_step + sent_per_step / micro_steps) / (
        hardware.bandwidth(ranks) * reached
    )
    exposed = EXPOSED * min(wire, networks) + max(0.0, wire - networks)
    memory = hardware.memory_tb_s * 1e12
    optimizer = OPTIMIZER_BYTES * (parameters / ranks + replicated) / memory
    reduced = 0.0 if ranks == 1 and stage == 3 else GRADIENT_BYTES
    gradients = (reduced * parameters + GRADIENT_BYTES * replicated) / memory
    return StepTime(
        networks=micro_steps * networks,
        lensnet=micro_steps * _lens_time(config, work, peak),
        communication=micro_steps * exposed,
        optimizer=micro_steps * gradients + optimizer,
        sent=micro_steps * sent_per_micro_step + sent_per_step,
        work=work * micro_steps,
    )


def _recomputation(layers: int, share: float) -> float:
    """Return the operations of recomputing `share` of the blocks, relative to those of forward and
    backward, of which the forward pass is a third.
    """
    return sum(recomputed_blocks(layers, share)) / (3 * layers)


def _lens_time(config: RunConfig, work: Work, peak: float) -> float:
    """Return the seconds that LensNet adds to a micro-step."""
    if not work.lensnet:
        return 0.0
    nodes = config.train.micro_batch_size * sum(config.mc.geometry.node_counts)
    return LENS_S_PER_NODE * nodes + work.lensnet / (peak * LENS_EFFICIENCY)


def _traffic(parameters: int, ranks: int, stage: int) -> tuple[float, float]:
    """Return the bytes that a rank sends in each micro-step, and once in each step."""
    others = (ranks - 1) / ranks
    weights, gradients = 2.0 * parameters * others, REDUCED_BYTES * parameters * others
    if stage == 3:
        return 2 * weights + gradients, 0.0
    if stage == 2:
        return gradients, weights
    return 0.0, 2 * gradients + weights
