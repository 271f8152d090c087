"""Plans a run without starting it: how to shard it over given GPUs, and its time and memory.

    python tools/plan_run.py --preset 70b --gpus 512 --gpu h100
    python tools/plan_run.py --gpus 8 --gpu h200 --config launch/recipes/pretrain/pretrain_124m.yaml

Accepts every option of launch/train.py. Without --config the vocabulary has 128,256 pieces and a
step about 4,000,000 tokens, unless options say otherwise. Chooses the ZeRO stage, micro-batch,
accumulation and activation checkpointing that are fastest and fit into memory. The results are
estimates; see docs/experiments/planner.md for their errors. Exit code: 0, or 2 if there is no such
plan.
"""

import argparse
import sys

from mc_ds.config import ConfigError
from mc_ds.config.cli import load_config
from mc_ds.console import HelpFormatter, run_program
from mc_ds.training.planning.hardware import HARDWARE
from mc_ds.training.planning.report import plan_report

TOKENS_PER_STEP = 4_000_000
"""Tokens of a step, if neither options nor a recipe set the global batch size."""
VOCAB_SIZE = 128_256
"""Size of the vocabulary, if neither options nor a recipe set it."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return this program's options, and all others for the run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", help="short for --backbone.preset")
    parser.add_argument("--gpus", type=int, required=True, help="total number of GPUs")
    parser.add_argument("--gpu", choices=sorted(HARDWARE), default="h100", help="GPU model")
    parser.add_argument("--vocab_size", type=int, help="size of the vocabulary, of any tokenizer")
    parser.add_argument(
        "--tokens", type=float, help="tokens to train on (default: 20 per backbone parameter)"
    )
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> int:
    """Print the plan and return the exit code."""
    args, options = parse(argv)
    try:
        if args.gpus < 1:
            raise ConfigError(f"--gpus = {args.gpus}: use at least 1")
        if args.tokens is not None and not 0 < args.tokens < float("inf"):
            raise ConfigError(f"--tokens = {args.tokens}: use a finite number above 0")
        if args.preset is not None:
            options += ["--backbone.preset", args.preset]
        if args.vocab_size is not None and args.vocab_size < 1:
            raise ConfigError(f"--vocab_size = {args.vocab_size}: use at least 1")
        if not _given(options, "--config", "--train.global_batch_size"):
            options += ["--train.global_batch_size", str(_batch(options, args.gpus))]
        config = load_config(options, prog="plan_run.py")
        if args.vocab_size is not None:
            config = config.with_vocabulary(args.vocab_size)
        elif not _given(options, "--config", "--data.vocab_size"):
            config = config.with_vocabulary(VOCAB_SIZE)
        print(plan_report(config, HARDWARE[args.gpu], args.gpus, tokens=args.tokens), end="")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _given(options: list[str], *names: str) -> bool:
    return any(option.partition("=")[0] in names for option in options)


def _batch(options: list[str], gpus: int) -> int:
    """Return a global batch size near TOKENS_PER_STEP, a multiple of GPUs * micro-batch."""
    config = load_config(options, prog="plan_run.py")
    unit = gpus * config.train.micro_batch_size
    return unit * max(1, round(TOKENS_PER_STEP / config.mc.seq_len / unit))


if __name__ == "__main__":
    run_program(main)
