"""Checks whether this machine can train, and reports what to fix.

    python tools/doctor.py                                     this machine
    python tools/doctor.py --hostfile hostfile                 also the hosts of a hostfile
    srun --nodes=2 --ntasks-per-node=8 python tools/doctor.py  also the ranks of a job

Exit code: 0, or 1 if a check fails. Writes and removes a file in the folders that it checks, and
changes nothing else.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from machine.findings import Check, Status, examine, table
from machine.gpus import check_gpus
from machine.hosts import check_hostfile, check_local, check_ranks
from machine.services import check_slurm, check_wandb
from machine.software import (
    check_bytecode,
    check_compiler,
    check_deepspeed,
    check_packages,
    check_python,
    check_tokenizer,
)
from machine.storage import check_folder, check_shared_memory

from mc_ds.config import DataConfig, RunConfig
from mc_ds.console import HelpFormatter, run_program


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--hostfile",
        type=Path,
        help="also check these hosts of the deepspeed launcher (see launch/hostfile.example)",
    )
    parser.add_argument(
        "--master_addr",
        help="first host's address, as you will give it to deepspeed (with --hostfile)",
    )
    parser.add_argument(
        "--run_dir",
        type=Path,
        default=Path(RunConfig().out_dir),
        help="folder of all runs (default: %(default)s)",
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=Path(DataConfig().cache_dir),
        help="data cache (default: %(default)s)",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="act as one rank of a communication test and print its report (used by --hostfile)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print the table of findings; return 1 if a check failed.

    With a launcher, every rank takes part in the communication test ("round trip"), and rank 0 runs
    all other checks.
    """
    args = parse(argv)
    if args.probe:
        from machine import probe

        return probe.main()
    rank = os.environ.get(
        "RANK", os.environ.get("SLURM_PROCID") if "SLURM_STEP_ID" in os.environ else None
    )
    round_trip: tuple[str, Check]
    if args.hostfile is not None:
        round_trip = ("hosts", partial(check_hostfile, args.hostfile, args.master_addr))
    else:
        round_trip = ("round trip", check_local if rank is None else check_ranks)
    others: list[tuple[str, Check]] = [
        ("python", check_python),
        ("bytecode", check_bytecode),
        ("packages", check_packages),
        ("deepspeed", check_deepspeed),
        ("gpus", check_gpus),
        ("compiler", check_compiler),
        ("run folder", partial(check_folder, args.run_dir, "run folder")),
        ("cache folder", partial(check_folder, args.cache_dir, "cache folder")),
        ("shared memory", check_shared_memory),
        ("sentencepiece", check_tokenizer),
        ("wandb", check_wandb),
        ("slurm", check_slurm),
    ]
    communication = examine([round_trip])  # first, because the other ranks wait for it
    if rank not in (None, "0"):
        return int(any(finding.status is Status.FAIL for finding in communication))
    findings = [*examine(others), *communication]
    print(table(findings))
    return int(any(finding.status is Status.FAIL for finding in findings))


if __name__ == "__main__":
    run_program(main)
