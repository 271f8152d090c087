"""Runs a grid of ablations and makes a table of results for each question.

    python tools/ablate.py --init_from one_level=BUNDLE --only index,ask --out runs/ablations

runs the trainings that the rows of these groups need (tools/ablations.yaml), each once, evaluates
them, prints a Markdown table per group and writes it to OUT/tables. A call resumes an earlier one
with the same --out: finished trials are not run again, failed ones are. Other options, such as
--train.compile=off, apply to every training, unless a row sets them, which is an error.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ablation.plan import read_plan
from ablation.trials import Trial, make_rows

from mc_ds.config import ConfigError
from mc_ds.console import HelpFormatter, run_program

ROOT = Path(__file__).parents[1]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return this program's options, and all others for training."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--plan",
        type=Path,
        default=ROOT / "tools" / "ablations.yaml",
        help="YAML file with bases, groups and variants (default: %(default)s)",
    )
    parser.add_argument("--only", default="", help="comma-separated groups; default: all")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablations"),
        help="folder for runs and tables (default: %(default)s)",
    )
    parser.add_argument(
        "--init_from",
        action="append",
        default=[],
        metavar="BASE=PATH",
        help="initial weights for a base: a bundle or a run; may be repeated",
    )
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[0],
        help="comma-separated seeds; each row runs with every seed (default: 0)",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="number of parallel commands (default: %(default)s)",
    )
    parser.add_argument(
        "--gpus",
        default=None,
        help="comma-separated GPUs, assigned to jobs in turn; default: all visible GPUs",
    )
    parser.add_argument(
        "--timeout_s",
        type=float,
        default=1800,
        help="time limit of a command, after which it counts as failed (default: %(default)s)",
    )
    parser.add_argument(
        "--time_limit_s",
        type=float,
        default=None,
        help="time limit of this call; the next call resumes",
    )
    parser.add_argument(
        "--remove_checkpoints",
        action="store_true",
        help="remove a training's checkpoints when its evaluations are finished",
    )
    parser.add_argument("--list", action="store_true", help="only print what would be run")
    return parser.parse_known_args(argv)


def positive(text: str) -> int:
    """Parse a positive integer, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def pairs(option: str, tokens: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` tokens to a dict. Raises ConfigError for any other token."""
    found = {}
    for token in tokens:
        name, given, value = token.partition("=")
        if not name or not given:
            raise ConfigError(f"unexpected argument {token!r}: use {option}NAME=VALUE")
        found[name] = value
    return found


def run(args: argparse.Namespace, trials: Sequence[Trial], command: str) -> None:
    """Run the missing trials. Return when all have ended, or early at the time limit or a
    signal.
    """
    from ablation.commands import Stop
    from ablation.runner import Runner, prepare_data, provenance, visible_gpus

    stop = Stop(args.time_limit_s)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.ask())
    prepare_data(trials)
    Runner(
        launch=ROOT / "launch",
        made=provenance(command, args.jobs),
        jobs=args.jobs,
        gpus=args.gpus.split(",") if args.gpus else visible_gpus(),
        timeout_s=args.timeout_s,
        stop=stop,
        remove_checkpoints=args.remove_checkpoints,
        report=lambda text: print(text, flush=True),
    ).run(trials)


def write_tables(folder: Path, tables: Mapping[str, str]) -> None:
    """Print the tables, and write each to a file named after its group."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        (folder / f"{name}.md").write_text(f"{table}\n", encoding="utf-8")
        print(f"\n{table}")


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code: 0 all rows are finished, 1 some are not, 2 invalid
    arguments.
    """
    args, rest = parse(argv)
    try:
        overrides = pairs("--", [token.removeprefix("--") for token in rest])
        plan = read_plan(args.plan)
        groups = plan.select([name for name in args.only.split(",") if name], overrides)
        rows = make_rows(
            plan,
            groups,
            seeds=args.seeds,
            out=args.out,
            weights=pairs("--init_from ", args.init_from),
            overrides=overrides,
        )
        runs = [run for several in rows.values() for row in several for run in row.runs]
        trials = list({trial.folder: trial for trial, _ in runs}.values())
        if not args.list:
            run(args, trials, f"python tools/ablate.py {shlex.join(argv)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        for trial in trials:
            steps, wanted = trial.config.train.total_steps, len(trial.evaluations)
            print(
                f"{trial.config.name}: {steps} steps, {len(trial.missing)} of {wanted} evaluations"
                " missing"
            )
        return 0
    from ablation.tables import group_table

    write_tables(
        args.out / "tables", {name: group_table(name, groups[name], rows[name]) for name in rows}
    )
    return int(any(trial.missing for trial in trials))


if __name__ == "__main__":
    run_program(main)
