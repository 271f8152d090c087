"""Measures how much distant blocks lower a language model's loss, and how well a ranker can predict
it.

    windows     draws windows of tokens from documents
    record      records gains of single blocks, states and attention: minutes on a GPU
    rank trains rankers of several inputs on the training windows, scores the test windows
    measure     measures the losses of what policies and rankers choose: a minute on a GPU
    table       prints what was measured, and estimates what was not

Question, commands and results: docs/experiments/block_gains.md.
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
from mc_ds.console import run_program


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=summary, description=summary)
        sub.set_defaults(run=run)
        sub.add_argument("--windows", type=Path, required=True, help=".npz file of windows")
        return sub

    draw = command(windows, "draw windows of tokens from documents")
    draw.add_argument(
        "--source", action="append", required=True, help="split,kind,limit[,join]:pattern, repeated"
    )
    draw.add_argument(
        "--characters", type=int, nargs=2, default=(40_000, 400_000), help="length of documents"
    )
    draw.add_argument("--seed", type=int, default=0)
    store = command(record, "record gains, states and attention")
    store.add_argument("--out", type=Path, required=True, help="folder")
    store.add_argument(
        "--candidates", type=int, default=89, help="distant blocks measured in a training window"
    )
    store.add_argument("--states_after", type=int, nargs="+", default=(8, 16, 24), help="layers")
    store.add_argument(
        "--width", type=int, default=112, help="dimensions that states are projected to"
    )
    store.add_argument("--heads", type=int, default=32, help="heads whose attention is kept")
    store.add_argument(
        "--seconds", type=float, default=1e9, help="begin no further window after this"
    )
    measuring = command(measure, "measure the losses of chosen blocks")
    measuring.add_argument("--out", type=Path, required=True, help=".npz file")
    measuring.add_argument(
        "--scores", type=Path, help=".npz file of scores by policy, made by `rank`"
    )
    measuring.add_argument(
        "--recording", type=Path, help="folder of `record`: adds the oracles and attention"
    )
    measuring.add_argument(
        "--greedy", type=int, nargs="*", default=(), help="slices for the greedy oracle"
    )
    train = command(rank, "train rankers and score the test windows")
    train.add_argument("--recording", type=Path, required=True, help="folder of `record`")
    train.add_argument("--out", type=Path, required=True, help=".npz file")
    train.add_argument(
        "--width", type=int, default=112, help="dimensions of vectors without context"
    )
    train.add_argument("--epochs", type=int, default=Training.epochs)
    train.add_argument(
        "--seeds", type=int, default=Training.seeds, help="rankers that are averaged"
    )
    train.add_argument("--threads", type=int, default=2, help="of the processor")
    show = command(table, "print tables of losses")
    show.add_argument(
        "--losses", type=Path, nargs="+", required=True, help=".npz files of `measure`"
    )
    show.add_argument(
        "--recording", type=Path, help="folder of `record`: adds what rankers are worth"
    )
    show.add_argument("--scores", type=Path, help=".npz file of `rank`")
    for sub in (draw, store, measuring, train):
        sub.add_argument("--bundle", type=Path, required=True, help="bundle of the backbone")
    for sub in (store, measuring):
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--rows", type=int, default=45, help="contexts read at a time")
        sub.add_argument("--compile", action="store_true", help="compile the transformer block")
        sub.add_argument("--limit", type=int, help="stop after this many windows")
    for sub in (store, measuring, train, show):
        for field in fields(Layout):
            sub.add_argument(
                f"--{field.name}", type=int, default=field.default, help="of the layout"
            )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run a command and return the exit code."""
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
