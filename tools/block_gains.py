"""Measures how much distant blocks lower a language model's loss, and how well rankers predict it.

    windows     draws windows of tokens from documents
    record      records gains of single blocks, hidden states and attention: minutes on a GPU
    rank        trains rankers with several kinds of input, and scores the test windows
    measure     measures the losses of the blocks chosen by policies and rankers: a minute on a GPU
    table       prints the losses, and estimates those that were not measured

See docs/experiments/block_gains.md for the question, the commands and the results.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from gains.commands import measure, rank, record, table, windows
from gains.layout import Layout
from gains.rankers import Training

from mc_ds.config import ConfigError
from mc_ds.console import HelpFormatter, run_program


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=summary, description=summary)
        sub.set_defaults(run=run)
        sub.add_argument("--windows", type=Path, required=True, help=".npz file with windows")
        return sub

    draw = command(windows, "draw windows of tokens from documents")
    draw.add_argument(
        "--source",
        action="append",
        required=True,
        help="split,kind,limit[,join]:pattern; may be repeated",
    )
    draw.add_argument(
        "--characters",
        type=int,
        nargs=2,
        default=(40_000, 400_000),
        help="minimum and maximum length of documents",
    )
    draw.add_argument("--seed", type=int, default=0)
    store = command(record, "record gains, states and attention")
    store.add_argument("--out", type=Path, required=True, help="folder to write")
    store.add_argument(
        "--candidates", type=int, default=89, help="distant blocks measured per training window"
    )
    store.add_argument(
        "--states_after",
        type=int,
        nargs="+",
        default=(8, 16, 24),
        help="layers after which hidden states are recorded",
    )
    store.add_argument(
        "--width", type=int, default=112, help="dimensions to which hidden states are projected"
    )
    store.add_argument("--heads", type=int, default=32, help="heads whose attention is recorded")
    store.add_argument(
        "--seconds", type=float, default=1e9, help="time after which no further window starts"
    )
    measuring = command(measure, "measure the losses of chosen blocks")
    measuring.add_argument("--out", type=Path, required=True, help=".npz file to write")
    measuring.add_argument(
        "--scores", type=Path, help=".npz file with scores by policy, made by `rank`"
    )
    measuring.add_argument(
        "--recording", type=Path, help="folder written by `record`; adds the oracles and attention"
    )
    measuring.add_argument(
        "--greedy",
        type=int,
        nargs="*",
        default=(),
        help="horizon slices for which the greedy oracle is measured",
    )
    train = command(rank, "train rankers and score the test windows")
    train.add_argument("--recording", type=Path, required=True, help="folder written by `record`")
    train.add_argument("--out", type=Path, required=True, help=".npz file to write")
    train.add_argument("--width", type=int, default=112, help="dimensions of context-free vectors")
    train.add_argument("--epochs", type=int, default=Training.epochs)
    train.add_argument(
        "--seeds", type=int, default=Training.seeds, help="number of rankers to average"
    )
    train.add_argument("--threads", type=int, default=2, help="CPU threads")
    show = command(table, "print tables of losses")
    show.add_argument(
        "--losses", type=Path, nargs="+", required=True, help=".npz files of `measure`"
    )
    show.add_argument(
        "--recording", type=Path, help="folder written by `record`; adds estimates for rankers"
    )
    show.add_argument("--scores", type=Path, help=".npz file of `rank`, for these estimates")
    for sub in (draw, store, measuring, train):
        sub.add_argument("--bundle", type=Path, required=True, help="bundle of the backbone")
    for sub in (store, measuring):
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--rows", type=int, default=45, help="contexts per forward pass")
        sub.add_argument("--compile", action="store_true", help="compile the transformer block")
        sub.add_argument("--limit", type=int, help="stop after this many windows")
    for sub in (store, measuring, train, show):
        for field in fields(Layout):
            sub.add_argument(
                f"--{field.name}",
                type=int,
                default=field.default,
                help="size in the layout of windows; see tools/gains/layout.py",
            )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run a command and return the exit code: 0 done, 2 invalid arguments or files."""
    args = parse(argv)
    try:
        with torch.no_grad():
            args.run(args)
    except (ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
