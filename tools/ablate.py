"""Runs a grid of ablations and puts what they gave into docs/ablations.json, which the tables in docs/experiments/README.md are made from.

    python tools/ablate.py --init_from one_level=BUNDLE --only index,ask --jobs 6 --out runs/ablations

trains what the rows of the groups need (tools/ablations.yaml), each training once, and evaluates it. A call goes on where an earlier one
with the same --out ended: finished rows are not run again, failed ones are. In the end its finished seeds join those of their row in
docs/ablations.json that were made alike, or its row replaces the one there; what is not finished replaces nothing that is, and all other
rows stay. Then the page is written anew between its markers. Further options, such as --train.compile=off, are settings of every
training; what rows of a chosen group decide is refused there.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ablation.jobs import Stop
from ablation.page import group_section, results_beside, section, shown, write_section
from ablation.plan import read_plan
from ablation.results import Results
from ablation.trials import Trial, make_grid

from mc_ds.config import ConfigError

LAUNCH = Path(__file__).parent

Selected = dict[str, list[str]]
"""Labels of rows by group."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line: its own options, and all others."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--plan",
        type=Path,
        default=LAUNCH / "ablations.yaml",
        help="bases, groups and variants (default: %(default)s)",
    )
    parser.add_argument(
        "--only", default="", help="comma-separated groups, or group/variant; default: all"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablations"),
        help="folder of runs and results (default: %(default)s)",
    )
    parser.add_argument(
        "--recipe", action="append", default=[], metavar="[BASE=]PATH", help="recipe of a base"
    )
    parser.add_argument(
        "--init_from",
        action="append",
        default=[],
        metavar="[BASE=]PATH",
        help="trained weights of a base: a bundle or a run",
    )
    parser.add_argument(
        "--steps", type=positive, help="optimizer steps of a base's plain variant; warm-ups follow"
    )
    parser.add_argument(
        "--samples", type=positive, help="sequences per evaluation; default: the plan's"
    )
    parser.add_argument(
        "--seeds",
        type=numbers,
        default=[0],
        help="comma-separated seeds: each row is run with every one (default: 0)",
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, help="commands at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus",
        default=None,
        help="comma-separated GPUs, dealt to the jobs in turn; default: all that are visible",
    )
    parser.add_argument(
        "--timeout_s",
        type=float,
        default=1800,
        help="seconds for one command, then it counts as failed (default: %(default)s)",
    )
    parser.add_argument(
        "--time_limit_s",
        type=float,
        default=None,
        help="seconds for this call, then it stops: the next one goes on",
    )
    parser.add_argument(
        "--remove_checkpoints",
        action="store_true",
        help="remove a training's checkpoints once its rows are finished",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=LAUNCH.parent / "docs" / "experiments" / "ablations.md",
        help="page of the tables; ablations.json, which they are made from, lies beside it (default: %(default)s)",
    )
    parser.add_argument(
        "--commit", default=None, help="commit to name on the page where git cannot tell"
    )
    parser.add_argument(
        "--table_only",
        action="store_true",
        help="run nothing: put what --out has beside the page, and write it",
    )
    parser.add_argument("--list", action="store_true", help="run nothing: print what would be run")
    return parser.parse_known_args(argv)


def positive(text: str) -> int:
    """A number of things."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def numbers(text: str) -> list[int]:
    """Comma-separated integers."""
    return [int(part) for part in text.split(",")]


def parse_settings(tokens: Sequence[str]) -> dict[str, str]:
    """`--name=value` or `--name value` pairs by name. Raises ConfigError for anything else."""
    settings: dict[str, str] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, given, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not name or not (given or rest):
            raise ConfigError(
                f"unexpected argument {token!r}: settings of the trainings are --section.field=value"
            )
        settings[name] = value if given else rest.pop(0)
    return settings


def by_base(pairs: Sequence[str]) -> dict[str | None, str]:
    """`BASE=PATH` options by base; a plain PATH by None."""
    parts = (pair.rpartition("=") for pair in pairs)
    return {base or None: path for base, _, path in parts}


def run(
    args: argparse.Namespace, overrides: Mapping[str, str], command: str
) -> tuple[Results, Selected, list[Trial]]:
    """Runs what is wanted and not known yet; returns all that --out has, and what was wanted. Raises ConfigError before anything starts."""
    plan = read_plan(args.plan)
    selected = plan.select(plan.split_names(args.only))
    used = {plan.groups[name].base for name in selected}
    for field in ("recipe", "init_from"):
        plan = plan.with_bases(field, by_base(getattr(args, field)), used)
    results = Results.load(args.out / "results.json")
    grid = make_grid(
        plan,
        selected,
        seeds=args.seeds,
        out=args.out,
        steps=args.steps,
        samples=args.samples,
        overrides=overrides,
    )
    trials = grid.wanted()
    if args.list:
        return results, selected, trials

    from ablation.grid import GridRunner, Programs, prepare_data, show_rows
    from ablation.provenance import provenance, visible_gpus

    stop = Stop(args.time_limit_s)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.ask())
    show_rows(results, plan, grid)
    prepare_data(trials)
    runner = GridRunner(
        results,
        args.out,
        Programs(LAUNCH / "train.py", LAUNCH / "evaluate.py"),
        provenance(command, args.jobs, args.commit),
        gpus=args.gpus.split(",") if args.gpus else visible_gpus(),
        timeout_s=args.timeout_s,
        stop=stop,
        remove_checkpoints=args.remove_checkpoints,
        report=lambda text: print(text, flush=True),
    )
    runner.run(trials)
    return results, selected, trials


def publish(page: Path, found: Results, wanted: Selected | None) -> Results:
    """Merges what was found into the results beside `page`, and writes both. Raises ConfigError, and changes nothing, where it cannot."""
    path = results_beside(page)
    results = Results.load(path).merged(found, wanted)
    text = section(results)
    results.save(path)
    write_section(page, text)
    return results


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 all rows that were asked for are finished, 1 some are not, 2 bad arguments."""
    args, rest = parse(argv)
    selected: Selected | None = None
    trials: list[Trial] = []
    try:
        if not args.list:
            Results.load(
                results_beside(args.docs)
            )  # what cannot be written, or read, is refused before anything runs
        if args.table_only:
            found = Results.load(args.out / "results.json")
        else:
            found, selected, trials = run(
                args, parse_settings(rest), f"python tools/ablate.py {shlex.join(argv)}"
            )
        open_trials = [
            trial
            for trial in trials
            if not all(found.finished(trial.key, key) for key in trial.evaluations)
        ]
        if args.list:
            for trial in trials:
                state = "open" if trial in open_trials else "known"
                print(
                    f"{state:6}{trial.config.train.total_steps:>7} steps, {len(trial.evaluations)} evaluations  {trial.name}"
                )
            return 0
        if args.table_only or any(trial.key in found.trials for trial in trials):
            results = publish(args.docs, found, selected)
            print(
                "\n\n".join(
                    group_section(results, name)
                    for name in shown(results)
                    if selected is None or name in selected
                )
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(bool(open_trials))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
