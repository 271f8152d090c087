"""Validation during training: losses on held-out sequences, the same ones each time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mc_ds.config import RunConfig
from mc_ds.data import Batch, MicroBatchDataset, MicroStep, RunData, SampleSource
from mc_ds.drawing import lens_debug_lines, lod_ascii_lines
from mc_ds.evaluation.batches import Batches
from mc_ds.evaluation.measure import Evaluator, Samples
from mc_ds.focus.controller import MCController
from mc_ds.focus.policies import policy
from mc_ds.inference.decoding.text import Decode
from mc_ds.metrics import Statistics
from mc_ds.model.megacontext import ModelOutput
from mc_ds.preference import preference_loss
from mc_ds.tasks import FINAL_STAGE, Task
from mc_ds.tasks.mixture import main_task, make_source, run_task, text_sources
from mc_ds.training.lens import lens_plan
from mc_ds.training.telemetry.continuations import MOST_TOKENS, Continuation


@dataclass(frozen=True)
class HeldOut:
    """Held-out data for validation."""

    mixture: SampleSource
    """Sequences from the same mixture as in training, for `val/loss`."""
    task: Task
    """The mixture's task with the largest share, on which policies are compared."""
    domains: Mapping[str, SampleSource]
    """Plain text of each domain by name, for `val/loss/{name}`; empty if there is only one."""
    decode: Decode
    """Tokens to text."""

    @classmethod
    def of(cls, config: RunConfig, data: RunData) -> "HeldOut":
        """Make the sources. Raises ConfigError if the held-out text is too short for `seq_len`."""
        return cls(
            make_source(config, data, data.val),
            run_task(main_task(config), config, data, data.val, seed=config.seed),
            text_sources(config, data, data.val) if len(data.val) > 1 else {},
            data.tokenizer.decode,
        )


class Validator:
    """Evaluates `eval_sequences` held-out sequences, in collective calls of all ranks.

    They are padded to whole micro-batches, so that every rank calls the model equally often.
    """

    def __init__(
        self,
        config: RunConfig,
        held_out: HeldOut,
        engine: Any,
        controller: MCController,
        device: torch.device,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """Draw the batches. `mark` is called before each call of the model.

        Raises ConfigError for a policy that needs a package which is not installed.
        """
        for name in config.validation.policies:
            policy(name).require()
        self.mark = mark
        self.config, self.task, self.decode = config, held_out.task, held_out.decode
        self.engine, self.controller = engine, controller
        self.device = device
        self.reader = Batches(
            forward=self._forward,
            mc=config.mc,
            controller=controller,
            focus=config.focus,
            seed=config.seed,
            batch_size=config.train.micro_batch_size,
            device=device,
        )
        self.evaluator = Evaluator(self.reader, [config.retrieval])
        self._first: ModelOutput | None = None
        self.batches = self._batches(held_out.mixture)
        self.domains = {name: self._batches(source) for name, source in held_out.domains.items()}

    def _batches(self, source: SampleSource) -> list[Batch]:
        """Return this rank's micro-batches of the first `eval_sequences` sequences."""
        config = self.config
        per_call = config.train.micro_batch_size * dist.get_world_size()
        calls = -(-config.validation.eval_sequences // per_call)
        dataset = MicroBatchDataset(
            source,
            config.mc,
            seed=config.seed + 1,
            micro_batch_size=config.train.micro_batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            accumulation_steps=calls,
        )
        return [
            dataset[MicroStep(0, micro, config.mc.train_wc_length, FINAL_STAGE)]
            for micro in range(calls)
        ]

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Return the validation metrics: `val/loss` (random variants; also by domain),
        `val/loss_baseline` (recency window), losses and hit rates by policy, `val/lensnet_calls`.
        """
        statistics = Statistics(device=self.device)
        self.engine.eval()
        with self.controller.inference():
            for batch in self.batches:
                on_device, output = self._read(batch)
                statistics = statistics.merge(self._statistics(on_device, output))
                if self.config.mc_log_lens_debug and batch is self.batches[0]:
                    self._first = output
            statistics = statistics.merge(self._domains()).merge(self._policies())
        self.engine.train()
        return statistics.all_reduce().record() | {
            "val/lensnet_calls": float(self.controller.inference_calls)
        }

    @torch.no_grad()
    def text_lines(self) -> list[str]:
        """Return the lines requested by `mc_log_lod_ascii` and `mc_log_lens_debug`, for this rank's
        first micro-batch. Call `run` before.
        """
        mc, batch, output = self.config.mc, self.batches[0], self._first
        lines: list[str] = []
        if self.config.mc_log_lod_ascii:
            for lods, starts in zip(*self._sequences(batch.lods, batch.starts), strict=True):
                lines += lod_ascii_lines(lods.numpy(), starts.numpy(), mc.block_size, mc.seq_len)
        if self.config.mc_log_lens_debug and mc.num_random_variants and output is not None:
            on_device = batch.to(self.device)
            with self.controller.inference():
                scores = self.controller.score(
                    output.visible_entries, *lens_plan(on_device, mc), output.lod0, on_device.tokens
                )
            parts = self._sequences(scores, on_device.lods, on_device.starts, output.row_scores)
            for sequence in zip(*parts, strict=True):
                result = preference_loss(
                    *sequence, rows_per_sequence=mc.rows_per_sequence, config=mc
                )
                corr = result.statistics.record().get("mc/preference_corr_mean")
                visible = sequence[0][:, : -mc.horizon_tokens]
                lines += lens_debug_lines(
                    visible.float().cpu().numpy(), sequence[3].cpu().numpy(), corr
                )
        return lines

    @torch.no_grad()
    def continuations(self) -> list[Continuation]:
        """Generate continuations of the first held-out sequences of `self.task`, from the start of
        their horizons.

        Contexts are chosen by LensNet; without variants they are uncompressed. Every rank generates
        all of them, so that all call the model equally often.
        """
        mc, count = self.config.mc, self.config.validation.continuations
        spec = policy("lens" if mc.num_random_variants else "full")
        length = spec.length(mc.train_wc_length / mc.seq_len, mc)
        tokens = min(MOST_TOKENS, mc.horizon_tokens)
        found: list[Continuation] = []
        self.engine.eval()
        with self.controller.inference():
            for first in range(0, count, self.reader.batch_size):
                ids = range(first, first + self.reader.batch_size)
                samples = Samples.of(self.task, [spec], ids)
                written = self.reader.read(samples, [spec]).written(spec, length, tokens)
                found += [
                    Continuation.of(
                        self.task.name,
                        index,
                        sample.tokens[: mc.seq_len + 1 - mc.horizon_tokens + tokens].tolist(),
                        row,
                        self.decode,
                    )
                    for index, sample, row in zip(
                        ids, samples.samples, written.tolist(), strict=True
                    )
                ]
        self.engine.train()
        return found[:count]

    def _read(self, batch: Batch) -> tuple[Batch, ModelOutput]:
        """Return the micro-batch on the device, and the model's output."""
        batch = batch.to(self.device)
        return batch, self._forward(batch.tokens, batch.lods, batch.starts, batch.horizon_mask)

    def _forward(self, *inputs: Tensor, **options: int) -> Any:
        """Call `mark`, then the model, so that the watchdog times single calls."""
        self.mark("validation")
        return self.engine(*inputs, **options)

    def _sequences(self, *tensors: Tensor) -> list[Tensor]:
        """Return each tensor with its rows grouped by sequence, [B, rows of a sequence, ...]."""
        batch = self.config.train.micro_batch_size
        return [tensor.unflatten(0, (batch, -1)) for tensor in tensors]

    def _policies(self) -> Statistics:
        """Return `val/horizon_loss/{policy}` and `val/hit_rate/{policy}` on `self.task` at the
        training W. All ranks make the same number of calls.
        """
        statistics = Statistics(device=self.device)
        mc, wanted = self.config.mc, self.config.validation
        if mc.num_random_variants == 0 or not wanted.policies:
            return statistics
        rank, world = dist.get_rank(), dist.get_world_size()
        per_call = self.reader.batch_size * world
        ids = range(rank, -(-wanted.eval_sequences // per_call) * per_call, world)
        found = self.evaluator.run(
            self.task, wanted.policies, [mc.train_wc_length / mc.seq_len], ids
        )
        records = {record.policy: record for record in found}
        # Add policies without a record too, because all ranks must reduce the same names.
        for name in wanted.policies:
            record = records.get(name)
            counted = (
                []
                if record is None
                else [
                    loss
                    for index, loss in zip(record.ids, record.losses, strict=True)
                    if index < wanted.eval_sequences  # the rest is padding
                ]
            )
            statistics.add_mean(f"val/horizon_loss/{name}", sum(counted), len(counted))
            rate = None if record is None else record.hit_rate
            statistics.add_mean(f"val/hit_rate/{name}", rate or 0.0, float(rate is not None))
        return statistics

    def _domains(self) -> Statistics:
        """Return `val/loss/{name}` of each domain."""
        statistics = Statistics(device=self.device)
        for name, batches in self.domains.items():
            for batch in batches:
                on_device, output = self._read(batch)
                counts, is_baseline = self._counted(on_device)
                if on_device.rows_per_sequence > 1:
                    counts = counts * (1 - is_baseline)
                row_loss = output.entry_nll.double().mean(dim=1)
                statistics.add_mean(f"val/loss/{name}", (row_loss * counts).sum(), counts.sum())
        return statistics

    def _counted(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return two masks [R] of 0 and 1: rows of sequences that are not padding, and
        baselines.
        """
        rows = batch.rows_per_sequence
        counts = (
            (batch.sample_ids < self.config.validation.eval_sequences)
            .double()
            .repeat_interleave(rows)
        )
        return counts, (torch.arange(len(counts), device=self.device) % rows == 0).double()

    def _statistics(self, batch: Batch, output: ModelOutput) -> Statistics:
        """Return the losses of variants and baselines, without padding."""
        statistics = Statistics(device=self.device)
        rows = self.config.mc.rows_per_sequence
        counts, is_baseline = self._counted(batch)
        row_loss = output.entry_nll.double().mean(dim=1)
        if rows == 1:
            statistics.add_mean("val/loss", (row_loss * counts).sum(), counts.sum())
            statistics.add_mean(
                "val/horizon_loss/full", (output.row_scores * counts).sum(), counts.sum()
            )
        else:
            variants = counts * (1 - is_baseline)
            statistics.add_mean("val/loss", (row_loss * variants).sum(), variants.sum())
        baseline = counts * is_baseline
        statistics.add_mean("val/loss_baseline", (row_loss * baseline).sum(), baseline.sum())
        return statistics
