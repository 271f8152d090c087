"""Runs one optimizer step: micro-steps of model and LensNet, reduction over ranks, both optimizers.

If the whole model is frozen (`train.frozen: all`), its forward pass runs without gradients, and the
engine runs neither backward pass nor step. Between the arrival of a batch and the end of
`engine.backward`, the host never waits for the device.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mc_ds.config import MCConfig, RunConfig
from mc_ds.data.batch import Batch
from mc_ds.focus.controller import MCController
from mc_ds.metrics import FlatStatistics, Statistics
from mc_ds.model.megacontext import ModelOutput
from mc_ds.preference import PreferenceLoss, PreferenceResult
from mc_ds.preference.telemetry import record_variants
from mc_ds.training.engine.graphs import GraphedFunction
from mc_ds.training.lens import ReplicatedLens, lens_plan
from mc_ds.training.schedule import learning_rate
from mc_ds.training.telemetry.timers import StepTimers


@dataclass(frozen=True)
class StepResult:
    """The results of an optimizer step."""

    statistics: Statistics
    """Metrics, reduced over ranks, on the device."""
    timers: StepTimers
    host: dict[str, float]
    """Metrics that are already on the host: learning rates, norms, whether steps were applied."""
    finite: bool
    """Whether the losses and gradients of engine and LensNet were finite; equal on all ranks."""
    sample_ids: list[Tensor]
    """Global sample indices [B] of each micro-step of this rank, on the host."""
    losses: list[Tensor]
    """Loss (0-d) of each micro-step of this rank, on the device."""


@dataclass
class StepRunner:
    """Runs optimizer steps. All state is in the engine and LensNet."""

    config: RunConfig
    engine: Any
    lens: ReplicatedLens | None
    controller: MCController
    device: torch.device
    autocast: torch.dtype | None
    mark: Callable[[str], None] = lambda phase: None
    """Called with the name of each phase as it begins."""
    before_optimizers: Callable[[], None] = lambda: None
    """Called once per step, between the last backward pass and the optimizers' steps."""

    def __post_init__(self) -> None:
        mc = self.config.mc
        self.model_learns = self.config.train.frozen != "all"
        self.preference = PreferenceLoss(mc, mc.rows_per_sequence)
        self.loss_statistics: Callable[[Tensor, Tensor, Tensor], FlatStatistics] = partial(
            loss_statistics, mc=mc
        )

    def graph_losses(self) -> None:
        """Run the preference loss and the loss statistics as CUDA graphs from now on."""
        self.preference.function = GraphedFunction(self.preference.function)
        self.loss_statistics = GraphedFunction(self.loss_statistics)

    def run(self, step: int, batches: Iterator[Batch], *, lens_start: int | None) -> StepResult:
        """Take optimizer step `step` with the next micro-batches of `batches`.

        LensNet runs from `lens_start` on (None: not at all), except in uncompressed steps (W = T),
        which give no pairs. A collective.
        """
        varies = self.config.mc.varies_at(step)
        lens = self.lens if varies and lens_start is not None and step >= lens_start else None
        timers, statistics = StepTimers(self.device), Statistics(device=self.device)
        host: dict[str, float] = {}
        if self.model_learns:
            host["train/lr"] = rate = learning_rate(step, self.config.train)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
        if self.lens is not None:
            self.lens.at_length(self.config.mc.wc_length_at(step))
        if lens is not None:
            lens.start_step()
        sample_ids: list[Tensor] = []
        losses: list[Tensor] = []
        accumulation = self.engine.gradient_accumulation_steps()
        for micro in range(accumulation):
            self.mark("data")
            waited = time.perf_counter()
            batch = next(batches)
            sample_ids.append(batch.sample_ids)
            batch = batch.to(self.device)
            timers.add("train/data_wait_ms", 1e3 * (time.perf_counter() - waited))
            micro_statistics, loss = self._micro_step(batch, lens, timers)
            statistics = statistics.merge(micro_statistics)
            losses.append(loss)
            if micro + 1 == accumulation:
                self.before_optimizers()
                if lens is not None:
                    lens.reduce()
            if self.model_learns:
                self.mark("optimizer step")
                self.engine.step()
        applied = not self.model_learns or bool(self.engine.was_step_applied())
        host["train/step_applied"] = float(applied)
        if lens is not None and lens_start is not None:
            self.mark("LensNet step")
            norm = lens.finish_step(step, start_step=lens_start, apply=applied)
            host |= {
                "mc/lens_lr": lens.optimizer.param_groups[0]["lr"],
                "mc/lens_step_applied": float(norm is not None),
            }
            if norm is not None:
                host["mc/lens_grad_norm"] = norm
        grad_norm = self.engine.get_global_grad_norm() if self.model_learns else None
        if grad_norm is not None:
            host["train/grad_norm"] = float(grad_norm)
        self.mark("metrics")
        finite = applied and (lens is None or lens.finite)
        return StepResult(statistics.all_reduce(), timers, host, finite, sample_ids, losses)

    def _micro_step(
        self, batch: Batch, lens: ReplicatedLens | None, timers: StepTimers
    ) -> tuple[Statistics, Tensor]:
        """Run forward and backward of one micro-batch; return its statistics and loss.

        LensNet runs exactly once, or not at all if `lens` is None.
        """
        self.mark("forward")
        with self.controller.micro_step(lens_active=lens is not None):
            with timers.time("train/forward_ms"), torch.set_grad_enabled(self.model_learns):
                output: ModelOutput = self.engine(
                    batch.tokens, batch.lods, batch.starts, batch.horizon_mask
                )
            if self.model_learns:
                self.mark("backward")
                with timers.time("train/backward_ms"):
                    self.engine.backward(output.loss)
            statistics = Statistics.from_flat(
                self.loss_statistics(output.entry_nll, output.row_scores, batch.lods)
            )
            if lens is not None:
                result = self._train_lens(batch, output, lens, timers)
                return statistics.merge(result.statistics), output.loss.detach()
        rows = batch.rows_per_sequence
        if rows > 1:
            lods, row_scores = (x.unflatten(0, (-1, rows)) for x in (batch.lods, output.row_scores))
            record_variants(statistics, lods, row_scores, self.config.mc.geometry)
        else:
            statistics.add_mean("mc/wc_length", batch.lods.size(1), 1)
        return statistics, output.loss.detach()

    def _train_lens(
        self, batch: Batch, output: ModelOutput, lens: ReplicatedLens, timers: StepTimers
    ) -> PreferenceResult:
        """Run LensNet's forward and backward pass on this micro-batch, and return the preference
        loss.
        """
        self.mark("LensNet")
        with timers.time("mc/lens_forward_ms"), autocast(self.device, self.autocast):
            scores = self.controller.score(
                output.visible_entries, *lens_plan(batch, self.config.mc), output.lod0, batch.tokens
            )
        with timers.time("mc/lens_loss_ms"):
            result = self.preference(
                scores, batch.lods, batch.starts, output.row_scores, lens.moments.moments
            )
        with timers.time("mc/lens_backward_ms"):
            lens.accumulate(result)
        return result


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return an autocast context to `dtype`, or an empty context if it is None.

    The cache of casts is off, because a captured CUDA graph must contain them.
    """
    return (
        torch.autocast(device.type, dtype, cache_enabled=False)
        if dtype is not None
        else nullcontext()
    )


def loss_statistics(
    entry_nll: Tensor, row_scores: Tensor, lods: Tensor, *, mc: MCConfig
) -> FlatStatistics:
    """Return `train/loss`, `train/horizon_loss`, `mc/lod_loss/{level}` (mean loss of the entries at
    each level) and, with variants, `mc/horizon_spread`.

    `entry_nll` and `lods` are [R, W]; `row_scores`, the horizon losses, are [R]. The spread is
    their standard deviation over a sequence's variants, averaged over sequences. It estimates how
    much a good choice of context can gain.
    """
    statistics = Statistics(device=lods.device)
    statistics.add_mean("train/loss", entry_nll.sum(), entry_nll.numel())
    statistics.add_mean("train/horizon_loss", row_scores.sum(), row_scores.numel())
    for level in range(mc.max_lod + 1):
        here = lods == level
        statistics.add_mean(f"mc/lod_loss/{level}", (entry_nll * here).sum(), here.sum())
    rows = mc.rows_at(lods.size(1))
    if rows > 1:
        spread = row_scores.unflatten(0, (-1, rows))[:, 1:].std(dim=1, correction=0)
        statistics.add_mean("mc/horizon_spread", spread.sum(), spread.numel())
    return statistics.flat()
