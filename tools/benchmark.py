"""Runs a benchmark of tools/bench by name, with its own options.

python tools/benchmark.py data --json data.jsonl
python tools/benchmark.py train --help
"""

import argparse
import importlib
import sys
from pathlib import Path

from mc_ds.console import HelpFormatter, run_program

BENCHMARKS = sorted(path.stem for path in (Path(__file__).parent / "bench").glob("*.py"))


def main(argv: list[str]) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        add_help=argv[:1] in ([], ["-h"], ["--help"]),
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", metavar="FILE", help="append the results to this file, as a line")
    args, others = parser.parse_known_args(argv)
    if args.json is not None:
        others = ["--json", args.json, *others]
    sys.argv[0] = f"{sys.argv[0]} {args.name}"
    result: int = importlib.import_module(f"bench.{args.name}").main(others)
    return result


if __name__ == "__main__":
    run_program(main)
