"""Plans a run on paper: how to shard it over given GPUs, and what time and memory it takes.

    python tools/plan_run.py --preset 70b --gpus 512 --gpu h100
    python tools/plan_run.py --gpus 8 --gpu h200 --config launch/recipes/pretrain/pretrain_124m.yaml

Takes every option of launch/train.py. ZeRO stage, micro-batch, recomputation and accumulation are
chosen: of what fits the memory, the fastest. Figures are estimates of docs/experiments/planner.md,
which has their errors. Exit code: 0, or 2 for what cannot work, told in one line.
"""

import argparse
import sys

from mc_ds.config import ConfigError
from mc_ds.config.cli import load_config
from mc_ds.console import run_program
from mc_ds.training.planning.hardware import HARDWARE
from mc_ds.training.planning.report import plan_report

TOKENS_PER_STEP = 4_000_000
"""Original tokens of a step that makes no other demand."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the plan, and those of the run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", help="short for --backbone.preset")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpu", choices=sorted(HARDWARE), default="h100", help="their kind")
    parser.add_argument("--vocab_size", type=int, default=128_256, help="tokens of the vocabulary")
    parser.add_argument(
        "--tokens", type=float, help="original tokens to train on (default: 20 per parameter)"
    )
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> int:
    """Print the plan."""
    args, options = parse(argv)
    try:
        if args.gpus < 1:
            raise ConfigError(f"--gpus = {args.gpus}: use at least 1")
        if args.tokens is not None and not 0 < args.tokens < float("inf"):
            raise ConfigError(f"--tokens = {args.tokens}: use a finite number above 0")
        if args.vocab_size < 1:
            raise ConfigError(f"--vocab_size = {args.vocab_size}: use at least 1")
        if args.preset is not None:
            options += ["--backbone.preset", args.preset]
        if not any(option.startswith("--train.global_batch_size") for option in options):
            options += ["--train.global_batch_size", str(_batch(options, args.gpus))]
        config = load_config(options, prog="plan_run.py").with_vocabulary(args.vocab_size)
        print(plan_report(config, HARDWARE[args.gpu], args.gpus, tokens=args.tokens), end="")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _batch(options: list[str], gpus: int) -> int:
    """Return a global batch near `TOKENS_PER_STEP` that the GPUs, and micro-batches, can share."""
    config = load_config(options, prog="plan_run.py")
    unit = gpus * config.train.micro_batch_size
    return unit * max(1, round(TOKENS_PER_STEP / config.mc.seq_len / unit))


if __name__ == "__main__":
    run_program(main)
