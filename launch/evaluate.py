"""Compares policies on tasks with a trained model.

    python launch/evaluate.py --checkpoint runs/recall --tasks recall,corpus --policies recency,random,lens --budgets 0.25,0.5
    python launch/evaluate.py --bundle runs/demo/bundle --tasks recall --policies recency,random,lens,blind

prints a table and writes JSON records and PNG plots beside them. With --checkpoint sequences are read in batches by the training code; with
--bundle each one is the history of an inference session, as it would be served. Both choose the same contexts.
"""

import argparse
import sys
from pathlib import Path

import torch

from mc_ds.config import ConfigError, FocusConfig, MCConfig, RunConfig
from mc_ds.config.history import with_history
from mc_ds.data import prepare_corpus
from mc_ds.evaluation.measure import Evaluator, Record
from mc_ds.evaluation.policies import Policies
from mc_ds.evaluation.report import lens_in_words, save_plots, save_records, table
from mc_ds.evaluation.sessions import SessionEvaluator
from mc_ds.evaluation.tasks import TASK_NAMES
from mc_ds.inference import load_bundle
from mc_ds.training.sources import run_task
from mc_ds.training.trained import load_trained


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="run folder or one of its checkpoints, of any ZeRO stage; or a bundle, read in batches")
    source.add_argument("--bundle", help="bundle, read by inference sessions")
    parser.add_argument("--tasks", default="corpus", help=f"comma-separated: {', '.join(TASK_NAMES)}")
    parser.add_argument("--policies", default="recency,random,uniform,lens,full", help=f"comma-separated: {', '.join(Policies.NAMES)}")
    parser.add_argument("--budgets", default="", help="comma-separated shares of the history; default: the one trained on")
    parser.add_argument("--seq_lens", default="", help="comma-separated history lengths in tokens; default: the one trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--samples", type=int, default=64, help="sequences per task")
    parser.add_argument("--questions", type=int, default=None, help="facts asked by the recall tasks; default: as trained")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences per forward, with --checkpoint")
    parser.add_argument("--search", type=int, default=None, help="blocks a search brings up, with --bundle; default: in long histories")
    parser.add_argument("--iterations", type=int, default=None, help="focus iterations; default: the run's")
    parser.add_argument("--memory", choices=("on", "off"), default=None, help="memory of the focus loop; default: the run's")
    parser.add_argument(
        "--show_focus", type=int, default=0, metavar="N", help="draw the working contexts of the first N sequences per task"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    parser.add_argument("--out", type=Path, default=Path("eval.json"), help="JSON records; plots lie beside it")
    return parser.parse_args(argv)


def evaluate_checkpoint(args: argparse.Namespace, seq_len: int | None) -> list[Record]:
    """All records at one history length, in batches."""
    trained = load_trained(args.checkpoint, device=torch.device(args.device), seq_len=seq_len)
    mc = trained.config.mc
    budgets = shares(args, mc)
    policies = Policies(mc, trained.controller, focus_of(args, trained.config), seed=args.seed, device=trained.device)
    evaluator = Evaluator(trained.model, policies, batch_size=args.batch_size, device=trained.device)
    names = [name for name in args.policies.split(",") if trained.lensnet is not None or name in ("recency", "full", "tail")]
    with trained.controller.inference():
        records: list[Record] = []
        for name in args.tasks.split(","):
            task = run_task(name, asking(args, trained.config), trained.corpus, trained.corpus.val, seed=args.seed)
            records += evaluator.run(task, names, budgets, range(args.samples))
            for index in range(args.show_focus):
                print("\n".join(evaluator.draw(task, names, budgets[0], index)))
    return records


def evaluate_bundle(args: argparse.Namespace, seq_len: int | None) -> list[Record]:
    """All records at one history length, by sessions."""
    model = load_bundle(args.bundle, device=args.device)
    config = model.config if seq_len is None else with_history(model.config, seq_len)
    corpus = prepare_corpus(config.data.model_copy(update={"tokenizer": args.bundle}))
    evaluator = SessionEvaluator(model, config.mc, focus=focus_of(args, config), seed=args.seed, search=args.search)
    budgets, records = shares(args, config.mc), []
    names = [name for name in args.policies.split(",") if model.lensnet is not None or name in ("recency", "full", "tail")]
    for name in args.tasks.split(","):
        task = run_task(name, asking(args, config), corpus, corpus.val, seed=args.seed)
        records += evaluator.run(task, names, budgets, range(args.samples))
        for index in range(args.show_focus):
            print("\n".join(evaluator.draw(task, names, budgets[0], index)))
    return records


def shares(args: argparse.Namespace, mc: MCConfig) -> list[float]:
    """The budgets asked for, as shares of the history; by default the one trained on."""
    return [float(x) for x in args.budgets.split(",") if x] or [mc.train_wc_length / mc.seq_len]


def focus_of(args: argparse.Namespace, config: RunConfig) -> FocusConfig:
    """The run's focus allocator with the changes asked for."""
    changes = {"iterations": args.iterations, "memory": None if args.memory is None else args.memory == "on"}
    return config.focus.model_copy(update={name: value for name, value in changes.items() if value is not None})


def asking(args: argparse.Namespace, config: RunConfig) -> RunConfig:
    """The run's tasks with as many questions as asked for."""
    if args.questions is None:
        return config
    recall = {**config.data.recall.model_dump(), "questions": args.questions, "min_questions": None}
    return RunConfig.model_validate({**config.model_dump(), "data": {**config.data.model_dump(), "recall": recall}})


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 bad arguments."""
    args = parse(argv)
    try:
        lengths: list[int | None] = [int(x) for x in args.seq_lens.split(",") if x] or [None]
        evaluate = evaluate_bundle if args.bundle else evaluate_checkpoint
        records = [record for length in lengths for record in evaluate(args, length)]
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([table(records), *lens_in_words(records)]))
    save_records(records, args.out)
    plots = save_plots(records, args.out.with_suffix(""))
    print(f"records: {args.out}; plots: {', '.join(map(str, plots))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
