"""Times what a loader process does for a micro-batch besides reading text: it draws the random
variants of each sequence and puts the micro-batch together, without any model.

Usage: python tools/benchmark.py sampler --config tools/bench/shapes/megacontext.yaml \
           --json bench.jsonl

Accepts every option of launch/train.py. Sequences are random tokens. Appends one JSON line: median,
least and most milliseconds of the variants of a sequence (`variants_ms`) and of a whole micro-batch
(`batch_ms`), and the entries per second that one process makes (`entries_per_s`).
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.train import random_batches, spread

from mc_ds.config import ConfigError
from mc_ds.config.cli import load_config
from mc_ds.console import HelpFormatter, run_program
from mc_ds.data import MicroStep
from mc_ds.training.run_state import versions
from mc_ds.variants import TrainingWCVariationAllocator


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return the benchmark's options, and all others for the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="file to which the results are appended, as a line"
    )
    parser.add_argument("--steps", type=int, default=50, help="repetitions of each measurement")
    return parser.parse_known_args(argv)


def timed(steps: int, work: Callable[[int], object]) -> dict[str, float]:
    """Return median, least and most milliseconds of `work(n)`, n = 1 .. steps, after an uncounted
    call.
    """
    work(0)
    times = []
    for number in range(1, steps + 1):
        begun = time.perf_counter()
        work(number)
        times.append(1e3 * (time.perf_counter() - begun))
    return spread(times)


def main(argv: list[str]) -> int:
    """Run the benchmark; return the exit code: 0 done, 2 invalid settings."""
    args, options = parse(argv)
    try:
        if args.steps < 1:
            raise ConfigError(f"--steps = {args.steps} must be at least 1")
        config = load_config(options, prog="benchmark.py sampler")
        mc, sequences = config.mc, config.train.micro_batch_size
        length = mc.wc_length_at(0)
        if mc.rows_at(length) == 1:
            raise ConfigError(
                f"mc.num_random_variants = {mc.num_random_variants} with W = {length} of T ="
                f" {mc.seq_len} has no variants to draw: use at least 2, and a W below T"
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    allocator = TrainingWCVariationAllocator.of(mc, length)
    dataset = random_batches(config, sequences)
    variants = timed(
        args.steps, lambda n: allocator.sample(mc.num_random_variants, (config.seed, n))
    )
    batch = timed(args.steps, lambda n: dataset[MicroStep(n, 0, length, 0)])
    rows = sequences * mc.rows_at(length)
    line = {
        "benchmark": "sampler",
        "run": config.name,
        "processor": platform.processor(),
        "sequences": sequences,
        "rows": rows,
        "wc_length": length,
        "seq_len": mc.seq_len,
        "versions": versions(),
        "variants_ms": variants,
        "batch_ms": batch,
        "entries_per_s": 1e3 * rows * length / batch["median"],
    }
    with args.json.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(
        f"{mc.num_random_variants} variants of a sequence {variants['median']:.2f} ms; "
        f"a micro-batch of {rows} rows {batch['median']:.2f} ms, "
        f"{line['entries_per_s']:,.0f} entries/s"
    )
    return 0


if __name__ == "__main__":
    run_program(main)
