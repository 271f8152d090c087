"""Times LensNet and the preference loss of a recipe on random contexts, in one process.

Usage: python tools/benchmark.py lens --config tools/bench/shapes/megacontext.yaml \
           --sequences 2,8 --json bench.jsonl

Accepts every option of launch/train.py. A micro-step has one forward pass of LensNet over R rows,
R = sequences x (num_random_variants + 1), the preference loss with all its metrics, and the
backward pass of both. On GPUs, as in the training of large models, LensNet is compiled as a whole
and the loss captured as a CUDA graph; `--eager` also times them without. No backbone runs: row
scores are random.

Appends one JSON line. `forward_ms`, `loss_ms` and `backward_ms` have the median, the least and the
most of `--steps` micro-steps of each R.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench.inference import wait
from bench.train import random_batches, spread
from torch import Tensor

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.cli import load_config
from mc_ds.console import HelpFormatter, run_program
from mc_ds.data import MicroStep
from mc_ds.model.build import build_lensnet
from mc_ds.model.device import device_of
from mc_ds.model.lensnet import LensNet
from mc_ds.preference import GainMoments, PreferenceLoss
from mc_ds.training.engine.engine import compile_lensnet
from mc_ds.training.engine.graphs import GraphedFunction
from mc_ds.training.lens import lens_plan
from mc_ds.training.run_state import versions
from mc_ds.training.step import autocast
from mc_ds.training.telemetry.timers import StepTimers

PHASES = ("forward_ms", "loss_ms", "backward_ms")
Record = dict[str, Any]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return the benchmark's options, and all others for the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="file to which the results are appended, as a line"
    )
    parser.add_argument(
        "--sequences",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[2],
        help="comma-separated numbers of sequences per micro-step, each measured",
    )
    parser.add_argument("--warmup", type=int, default=3, help="micro-steps before timing starts")
    parser.add_argument("--steps", type=int, default=20, help="micro-steps to time")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device"
    )
    parser.add_argument(
        "--eager", action="store_true", help="also measure without compiler and CUDA graphs"
    )
    return parser.parse_known_args(argv)


class MicroSteps:
    """LensNet and preference loss on one batch of random contexts."""

    def __init__(
        self, config: RunConfig, sequences: int, device: torch.device, *, fast: bool
    ) -> None:
        self.config, self.device = config, device
        number = MicroStep(0, 0, config.mc.wc_length_at(0), 0)
        self.batch = random_batches(config, sequences)[number].to(device)
        lensnet = build_lensnet(config)
        assert lensnet is not None
        self.lensnet: LensNet = lensnet.to(device).train()
        self.preference = PreferenceLoss(config.mc, config.mc.rows_per_sequence)
        if fast:
            compile_lensnet(self.lensnet, whole=True)
            self.preference.function = GraphedFunction(self.preference.function)
        bf16 = config.train.precision_on(device.type) != "fp32"
        self.autocast = torch.bfloat16 if bf16 else None
        self.plan = lens_plan(self.batch, config.mc)
        self.inputs = self._inputs(self.autocast or torch.float32)
        self.moments = GainMoments(beta=config.mc.lens_adv_norm_beta, device=device).moments

    def _inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return random visible entries [R, M, D], token embeddings [B, T, D] and row scores
        [R].
        """
        mc, width = self.config.mc, self.config.backbone.dim
        generator = torch.Generator().manual_seed(self.config.seed)
        rows, entries = self.plan[0].shape
        shapes = (
            (rows, entries - mc.horizon_tokens, width),
            (len(self.batch.tokens), mc.seq_len, width),
            (len(self.batch.lods),),
        )
        entries_RMD, lod0_BTD, scores_R = (
            torch.randn(shape, generator=generator).to(self.device) for shape in shapes
        )
        return entries_RMD.to(dtype), lod0_BTD.to(dtype), scores_R

    def run(self) -> dict[str, float]:
        """Run one micro-step; return the milliseconds of each phase. Waits for the device."""
        timers, (entries, lod0, row_scores) = StepTimers(self.device), self.inputs
        self.lensnet.zero_grad()
        with timers.time("forward_ms"), autocast(self.device, self.autocast):
            scores = self.lensnet(entries, *self.plan, lod0, self.batch.tokens)
        with timers.time("loss_ms"):
            result = self.preference(
                scores, self.batch.lods, self.batch.starts, row_scores, self.moments
            )
        with timers.time("backward_ms"):
            result.numerator.backward()
        wait(self.device)
        return timers.read()


def measure(args: argparse.Namespace, config: RunConfig, device: torch.device) -> Iterator[Record]:
    """Yield the record of each number of sequences, by each way of computing it."""
    on_gpu = device.type == "cuda"
    for sequences in args.sequences:
        for fast in [True, False] if on_gpu and args.eager else [on_gpu]:
            steps = MicroSteps(config, sequences, device, fast=fast)
            for _ in range(args.warmup):
                steps.run()
            times = [steps.run() for _ in range(args.steps)]
            yield {
                "sequences": sequences,
                "rows": len(steps.batch.lods),
                "compiled": fast,
                **{phase: spread([step[phase] for step in times]) for phase in PHASES},
            }


def main(argv: list[str]) -> int:
    """Run the benchmark; return the exit code: 0 done, 2 invalid settings."""
    args, options = parse(argv)
    try:
        if min(args.sequences) < 1 or args.steps < 1:
            raise ConfigError(
                f"--sequences {args.sequences}, --steps {args.steps}: each must be at least 1"
            )
        config = load_config(options, prog="benchmark.py lens")
        if not config.mc.num_random_variants:
            raise ConfigError("mc.num_random_variants = 0 trains no LensNet: use 2 or more")
        device = device_of(args.device)
        measured = []
        for record in measure(args, config, device):
            measured.append(record)
            way = "compiled" if record["compiled"] else "eager"
            times = ", ".join(f"{phase[:-3]} {record[phase]['median']:.2f}" for phase in PHASES)
            print(f"R = {record['rows']:>3}, {way}: {times} ms")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    line = {
        "benchmark": "lens",
        "run": config.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "wc_length": config.mc.wc_length_at(0),
        "seq_len": config.mc.seq_len,
        "versions": versions(),
        "measured": measured,
    }
    with args.json.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    run_program(main)
