"""Measures how long checkpoints pause training, in the foreground and in the background.

Usage: torchrun --standalone --nproc_per_node 1 tools/benchmark.py checkpoint \
           --config tools/bench/shapes/plain.yaml --folder /scratch --json bench.jsonl

Accepts every option of launch/train.py. Runs the trainer's steps on random tokens, on all ranks of
the launcher: first without checkpoints, then with one in the foreground and several in the
background.

Rank 0 appends one JSON line: bytes of a checkpoint, seconds for which it pauses training, seconds
until it is published, and milliseconds per step while none and while one is being written.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench.train import Step, describe, finish, ours, record, weak_scaling

from mc_ds.config import ConfigError
from mc_ds.config.cli import load_config
from mc_ds.console import HelpFormatter, run_program
from mc_ds.training.checkpoint import CheckpointSaver
from mc_ds.training.engine.deepspeed_config import resolve_deepspeed_config
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.ranks.agreement import broadcast, gather, is_main
from mc_ds.training.ranks.distributed import (
    device_type,
    read_rank_environment,
    start_distributed,
)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return the benchmark's options, and all others for the run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="file to which the results are appended, as a line"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for the checkpoints, which are removed at the end (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=8, help="steps to time without checkpoints")
    parser.add_argument(
        "--saves",
        type=int,
        default=3,
        help="checkpoints in the background, of which the first also allocates memory for its copy"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--most_steps", type=int, default=10_000, help="maximum number of steps in all"
    )
    return parser.parse_known_args(argv)


class Steps:
    """Runs and times the steps of a run."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._on_gpu = step, device.type == "cuda"
        self._number = 0

    def take(self) -> float:
        """Run the next step and return its time in ms."""
        begun = time.perf_counter()
        self._step(self._number)()
        if self._on_gpu:
            torch.cuda.synchronize()
        self._number += 1
        return 1e3 * (time.perf_counter() - begun)


def measure(
    saver: CheckpointSaver, steps: Steps, lens: Any, *, alone: int, saves: int
) -> dict[str, Any]:
    """Run `alone` steps without checkpoints, then save one in the foreground and `saves` in the
    background; return this rank's results. A collective.
    """

    def begin(step: int, *, background: bool) -> float:
        begun = time.perf_counter()
        state = None if lens is None else lens.state_dict()
        saver.begin(step=step, lens_state=state, trainer_state={}, background=background)
        return time.perf_counter() - begun

    def finish() -> tuple[float, Path]:
        begun = time.perf_counter()
        path = saver.finish()
        return time.perf_counter() - begun, path

    idle = [steps.take() for _ in range(alone)]
    foreground = begin(1, background=False)
    publishing, path = finish()
    size = sum(file.stat().st_size for file in path.iterdir())
    copies, publications, durations, beside = [], [], [], []
    for number in range(saves):
        saver.finish_removal()  # in a run, it has long ended when the next save begins
        begun = time.perf_counter()
        copies.append(begin(2 + number, background=True))
        while any(gather(saver.writing)):
            beside.append(steps.take())
        published, _ = finish()
        publications.append(published)
        durations.append(time.perf_counter() - begun)
    return {
        "checkpoint_bytes": size,
        "foreground_stall_s": foreground + publishing,
        "background_stall_s": [sum(both) for both in zip(copies, publications, strict=True)],
        "background_copy_s": copies,
        "background_publication_s": publications,
        "background_published_after_s": durations,
        "step_ms": statistics.median(idle),
        "step_ms_while_writing": statistics.median(beside) if beside else None,
        "steps_while_writing": len(beside),
    }


def main(argv: list[str]) -> int:
    """Run the benchmark on all ranks; return the exit code: 0 done, 2 invalid settings."""
    args, options = parse(argv)
    try:
        env = read_rank_environment()
        config = weak_scaling(load_config(options), env.world_size, args.most_steps)
        ds_config = resolve_deepspeed_config(config, env.world_size, device_type())
        device = start_distributed(env)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = describe(config, ds_config, env.world_size, device)
    step, runner = ours(config, ds_config, env, device)
    steps = Steps(step, device)
    for _ in range(2):  # allocate memory and compile
        steps.take()
    folder = Path(broadcast(tempfile.mkdtemp(dir=args.folder) if is_main() else ""))
    try:
        saver = CheckpointSaver(
            folder,
            runner.engine,
            keep_last=1,
            watchdog=Watchdog(0, env.rank, folder),
            ranks_per_host=env.local_world_size,
        )
        figures = measure(saver, steps, runner.lens, alone=args.steps, saves=args.saves)
        saver.finish_removal()
    finally:
        if env.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    record(args.json if env.is_main else None, facts | figures)
    finish()
    return 0


if __name__ == "__main__":
    run_program(main)
