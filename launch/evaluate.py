"""Compares policies on tasks with a trained model.

    python launch/evaluate.py --checkpoint runs/recall --tasks recall,corpus --policies recency,random,lens --budgets 0.25,0.5

prints a table and writes JSON records and PNG plots beside them.
"""

import argparse
import sys
from pathlib import Path

import torch

from mc_ds.config import ConfigError
from mc_ds.evaluation.measure import Evaluator, Record
from mc_ds.evaluation.policies import Policies
from mc_ds.evaluation.report import save_plots, save_records, table
from mc_ds.evaluation.tasks import TASK_NAMES
from mc_ds.training.sources import run_task
from mc_ds.training.trained import load_trained


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder or one of its checkpoints, of any ZeRO stage")
    parser.add_argument("--tasks", default="corpus", help=f"comma-separated: {', '.join(TASK_NAMES)}")
    parser.add_argument("--policies", default="recency,random,uniform,lens,full", help=f"comma-separated: {', '.join(Policies.NAMES)}")
    parser.add_argument("--budgets", default="", help="comma-separated shares of the history; default: the one trained on")
    parser.add_argument("--seq_lens", default="", help="comma-separated history lengths in tokens; default: the one trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--samples", type=int, default=64, help="sequences per task")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences per forward")
    parser.add_argument("--iterations", type=int, default=None, help="focus iterations; default: the run's")
    parser.add_argument(
        "--show_focus", type=int, default=0, metavar="N", help="draw the working contexts of the first N sequences per task"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    parser.add_argument("--out", type=Path, default=Path("eval.json"), help="JSON records; plots lie beside it")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace, seq_len: int | None) -> list[Record]:
    """All records at one history length."""
    trained = load_trained(args.checkpoint, device=torch.device(args.device), seq_len=seq_len)
    mc = trained.config.mc
    budgets = [float(x) for x in args.budgets.split(",") if x] or [mc.train_wc_length / mc.seq_len]
    focus = trained.config.focus
    if args.iterations is not None:
        focus = focus.model_copy(update={"iterations": args.iterations})
    policies = Policies(mc, trained.controller, focus, seed=args.seed, device=trained.device)
    evaluator = Evaluator(trained.model, policies, batch_size=args.batch_size, device=trained.device)
    names = [name for name in args.policies.split(",") if trained.lensnet is not None or name in ("recency", "full", "tail")]
    with trained.controller.inference():
        records: list[Record] = []
        for name in args.tasks.split(","):
            task = run_task(name, trained.config, trained.corpus, trained.corpus.val, seed=args.seed)
            records += evaluator.run(task, names, budgets, range(args.samples))
            for index in range(args.show_focus):
                print("\n".join(evaluator.draw(task, names, budgets[0], index)))
    return records


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 bad arguments."""
    args = parse(argv)
    try:
        lengths: list[int | None] = [int(x) for x in args.seq_lens.split(",") if x] or [None]
        records = [record for length in lengths for record in evaluate(args, length)]
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(records))
    save_records(records, args.out)
    plots = save_plots(records, args.out.with_suffix(""))
    print(f"records: {args.out}; plots: {', '.join(map(str, plots))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
