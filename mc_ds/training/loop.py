"""The training loop: builds the parts, runs steps, validates, checkpoints, reports.

`train(config)` is the whole of `launch/train.py`; everything it does is in a room of its own.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from mc_ds.config import RunConfig
from mc_ds.config.recipe import save_config
from mc_ds.controller import MCController
from mc_ds.data import Batch, LanguageModelSource, MicroBatchDataset, MicroStep, make_loader, prepare_corpus
from mc_ds.lensnet import LensNet
from mc_ds.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from mc_ds.training.deepspeed_config import resolve_deepspeed_config
from mc_ds.training.distributed import RankEnvironment, device_type, read_rank_environment, start_distributed
from mc_ds.training.engine import build_engine, build_model, compile_blocks, use_compilation
from mc_ds.training.lens import ReplicatedLens
from mc_ds.training.report import Reporter
from mc_ds.training.step import StepResult, StepRunner
from mc_ds.training.validation import Validator


def train(config: RunConfig) -> Path:
    """Trains one run on all ranks of the launcher and returns its folder. Raises ConfigError for what cannot work."""
    trainer = Trainer(config, read_rank_environment())
    trainer.fit()
    dist.barrier()
    dist.destroy_process_group()
    return trainer.folder


class Trainer:
    """One run on one rank. What cannot work is refused before ranks meet and before the run's folder exists."""

    def __init__(self, config: RunConfig, env: RankEnvironment) -> None:
        self.config, self.env = config, env
        self.folder = Path(config.out_dir) / config.name
        ds_config = resolve_deepspeed_config(config, env.world_size, device_type())
        checkpoint = find_checkpoint(config.resume, self.folder / "checkpoints", env.world_size)
        corpus = prepare_corpus(config.data)
        self.train_source, val_source = (
            LanguageModelSource(shards, seq_len=config.mc.seq_len, horizon_tokens=config.mc.horizon_tokens, seed=config.seed)
            for shards in (corpus.train, corpus.val)
        )
        self.device = device = start_distributed(env)
        if env.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(config, self.folder / "config.yaml")
        model = build_model(config, ds_config, vocab_size=corpus.tokenizer.vocab_size)
        self.engine = build_engine(config, ds_config, model, device)
        lensnet = LensNet(config.mc, dim=config.backbone.dim).to(device) if config.mc.num_random_variants else None
        self.lens = ReplicatedLens(lensnet, config.mc, config.train) if lensnet is not None else None
        self.controller = MCController(lensnet)
        if use_compilation(config, device):
            lengths = {config.mc.train_wc_length, *(stage.train_wc_length for stage in config.mc.wc_schedule)}
            compile_blocks([model, *([lensnet] if lensnet is not None else [])], num_shapes=len(lengths))
        autocast = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else None
        self.runner = StepRunner(config, self.engine, self.lens, self.controller, device, autocast)

        self.validator = Validator(config, val_source, self.engine, self.controller, device, autocast)
        self.step = self._resume(checkpoint) if checkpoint is not None else 0
        self.reporter = Reporter(config, self.folder, enabled=env.is_main, start_step=self.step)

    def fit(self) -> None:
        """Runs the remaining steps, with validation before the first, at intervals and after the last."""
        total, every = self.config.train.total_steps, self.config.validation.eval_interval
        batches = self._batches()
        if every and self.step == 0:
            self._validate()
        while self.step < total:
            started = time.perf_counter()
            result = self.runner.run(self.step, batches)
            self.step += 1
            self.reporter.step(self.step, result, self._counts(result, started))
            last = self.step == total
            if every and (self.step % every == 0 or last):
                self._validate()
            interval = self.config.checkpoint.interval
            if last or (interval and self.step % interval == 0):
                self.reporter.flush()
                self.save()
        self.reporter.close()

    def save(self) -> Path:
        """Checkpoints engine, LensNet and trainer on all ranks together."""
        return save_checkpoint(
            self.folder / "checkpoints",
            self.engine,
            step=self.step,
            lens_state=self.lens.state_dict() if self.lens is not None else None,
            trainer_state={
                "lensnet_calls": self.controller.training_calls,
                "val_lensnet_calls": self.controller.inference_calls,
                "world_size": self.env.world_size,
            },
            keep_last=self.config.checkpoint.keep_last,
        )

    def _resume(self, checkpoint: Path) -> int:
        """Restores a checkpoint; returns the number of steps it has done."""
        state, lens_state = load_checkpoint(checkpoint, self.engine, self.device)
        if self.lens is not None and lens_state is not None:
            self.lens.load_state_dict(lens_state)
        self.controller.training_calls = state["lensnet_calls"]
        self.controller.inference_calls = state["val_lensnet_calls"]
        return int(state["step"])

    def _batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the present step on."""
        config, accumulation = self.config, self.engine.gradient_accumulation_steps()
        dataset = MicroBatchDataset(
            self.train_source,
            config.mc,
            seed=config.seed,
            micro_batch_size=config.train.micro_batch_size,
            rank=self.env.rank,
            world_size=self.env.world_size,
            accumulation_steps=accumulation,
        )
        micro_steps = (
            MicroStep(step, micro, config.mc.wc_length_at(step), 0)
            for step in range(self.step, config.train.total_steps)
            for micro in range(accumulation)
        )
        return make_loader(dataset, micro_steps, num_workers=config.data.num_workers, pin_memory=self.device.type == "cuda")

    def _validate(self) -> None:
        """Held-out losses into the record of the present step; contexts and scores to the screen where asked."""
        self.reporter.validation(self.step, self.validator.run())
        self.reporter.text(self.validator.text_lines())

    def _counts(self, result: StepResult, started: float) -> dict[str, float]:
        """Throughput of the step in original tokens and in entries, and the cumulative counts."""
        config, seconds = self.config, time.perf_counter() - started
        sequences = config.train.global_batch_size
        tokens = sequences * config.mc.seq_len
        length = config.mc.wc_length_at(self.step - 1) if config.mc.num_random_variants else config.mc.seq_len
        entries = sequences * config.mc.rows_per_sequence * length
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return result.host | {
            "train/peak_memory_gb": peak / 1e9,
            "train/tokens": float(self.step * tokens),
            "train/tokens_per_s": tokens / seconds,
            "train/entries_per_s": entries / seconds,
            "train/step_ms": 1e3 * seconds,
            "mc/lensnet_calls": float(self.controller.training_calls),
        }
