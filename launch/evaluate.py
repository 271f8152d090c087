"""Compares context policies on tasks, with a trained model.

    python launch/evaluate.py --checkpoint runs/recall --tasks recall,corpus --budgets 0.25,0.5
    python launch/evaluate.py --bundle runs/demo/bundle --tasks recall --policies recency,lens,blind
    python launch/evaluate.py --checkpoint runs/real_focus --refocus 16 --policies recency,lens,full
    python launch/evaluate.py --bundle bundles/smollm2 --tasks ruler --policies full,recency,bm25

The first two print a table and write JSON records and PNG plots; --show_focus also draws the
contexts. With --checkpoint sequences run in batches, through the training code; with --bundle each
one is the history of an inference session, as in serving. Both choose the same contexts. The third
predicts the ends of long held-out documents and chooses contexts anew every 16 tokens. The fourth
lets the model write the answers to prompts, and scores what they contain.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.trained import with_history
from mc_ds.console import HelpFormatter, run_program
from mc_ds.console.signals import StopSignals
from mc_ds.data import RunData
from mc_ds.evaluation.answers.answer import answer
from mc_ds.evaluation.batches import Batches
from mc_ds.evaluation.focus_file import save_focus_maps
from mc_ds.evaluation.focus_plot import save_focus_plot
from mc_ds.evaluation.measure import Evaluator, specs_of
from mc_ds.evaluation.records import Record
from mc_ds.evaluation.report import (
    access_lines,
    best_query_lines,
    lens_ratio_lines,
    save_plots,
    save_records,
    settings_lines,
    table,
)
from mc_ds.evaluation.request import DEFAULT_POLICIES, Request
from mc_ds.evaluation.sessions import Sessions
from mc_ds.evaluation.streaming.batches import DocumentBatches
from mc_ds.evaluation.streaming.records import StreamRecord
from mc_ds.evaluation.streaming.sessions import DocumentSessions
from mc_ds.evaluation.streaming.stream import stream
from mc_ds.evaluation.streaming.streaming import DocumentReader
from mc_ds.evaluation.views import Focus, focus_lines
from mc_ds.focus.policies import POLICIES
from mc_ds.inference import load_bundle
from mc_ds.tasks import TASK_NAMES, Task, too_few_facts
from mc_ds.tasks.mixture import evaluated_task
from mc_ds.tasks.prompts import PROMPT_GROUPS, PROMPTS
from mc_ds.weights.open import load_trained, open_weights

POLICIES_HELP = (
    f"comma-separated (default: {','.join(DEFAULT_POLICIES)}). Information that each may use: "
    + "; ".join(f"{name}: {spec.access.value}" for name, spec in POLICIES.items())
)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        help="run folder, checkpoint or bundle; evaluated in batches",
    )
    source.add_argument("--bundle", help="bundle; evaluated with inference sessions")
    _add_data(parser.add_argument_group("tasks and data"))
    _add_contexts(parser.add_argument_group("contexts"))
    _add_execution(parser.add_argument_group("execution and output"))
    return parser.parse_args(argv)


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tasks",
        default="corpus",
        help=f"comma-separated: {', '.join(TASK_NAMES)}; or prompts, to which the model writes"
        f" answers (--bundle only): {', '.join((*PROMPT_GROUPS, *PROMPTS))}",
    )
    group.add_argument("--samples", type=int, default=64, help="sequences per task")
    group.add_argument(
        "--questions",
        type=int,
        default=None,
        help="facts asked per sequence in recall tasks; default: as trained",
    )
    group.add_argument(
        "--wordnet",
        default=None,
        metavar="DIR",
        help="folder of WordNet's database files for the tasks synonym and gloss, such as"
        " /usr/share/wordnet (Debian's package wordnet-base)",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the samples")
    group.add_argument(
        "--seq_lens",
        default="",
        help="comma-separated history lengths in tokens; default: as trained",
    )
    group.add_argument(
        "--budgets",
        default="",
        help="comma-separated context lengths, as shares of the history; the largest determines "
        "how many facts are planted; default: as trained",
    )
    text = group.add_mutually_exclusive_group()
    text.add_argument(
        "--data_root",
        default=None,
        help="folder of text files to evaluate on; default: the text that the config "
        "names (for a bundle, which keeps no paths, only Python's standard library)",
    )
    text.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="PATH",
        help="dataset of tools/prepare_data.py whose validation split is evaluated on instead;"
        " repeatable",
    )
    group.add_argument(
        "--whole",
        action="store_true",
        help="with --refocus, read the documents of both splits of a text that the model was not"
        " trained on",
    )
    group.add_argument(
        "--refocus",
        default="",
        help="predict long held-out documents instead of tasks, refocusing every N tokens; N may be"
        " several, comma-separated, and `never`",
    )
    group.add_argument(
        "--predict", type=int, default=256, help="tokens to predict per document (--refocus only)"
    )


def _add_contexts(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--policies", default=None, help=POLICIES_HELP)
    group.add_argument(
        "--iterations", type=int, default=None, help="focus iterations; default: the run's"
    )
    group.add_argument(
        "--memory",
        choices=("on", "off"),
        default=None,
        help="setting focus.memory; default: the run's",
    )
    group.add_argument(
        "--lens_blocks",
        type=int,
        default=None,
        help="blocks that LensNet chooses in contexts of tokens alone; default: the run's",
    )
    group.add_argument(
        "--neighbours",
        type=float,
        default=None,
        help="share of the larger score of its two neighbours that is added to each block's score,"
        " by LensNet in contexts of tokens alone and by retrieval; default: the run's",
    )
    group.add_argument(
        "--earlier_tokens",
        type=int,
        default=None,
        help="in contexts of tokens alone, let LensNet also score blocks as they were this many"
        " tokens earlier, and count the larger score (not in histories that a search reads);"
        " default: the run's",
    )
    group.add_argument(
        "--search",
        type=int,
        default=None,
        help="blocks that a search of the history proposes, 0: no search (--bundle only); default:"
        " search only long histories",
    )
    group.add_argument(
        "--query_tokens",
        default="",
        help="number of last tokens used as query by bm25, ngram, dense and attention; several,"
        " comma-separated, are compared; default: the run's",
    )
    group.add_argument(
        "--retrieval_share",
        type=float,
        default=None,
        help="share of the open blocks that these policies choose, the rest being the most recent"
        " blocks; default: the run's",
    )
    group.add_argument(
        "--retrieval_shape",
        choices=("blocks", "cover"),
        default=None,
        help="these policies' contexts: only open blocks, or also gists of all others; default: the"
        " run's",
    )


def _add_execution(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="sequences or documents per forward pass (--checkpoint), or prompts that are answered"
        " together",
    )
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device"
    )
    group.add_argument(
        "--show_focus",
        type=int,
        default=0,
        metavar="N",
        help="draw the working contexts of the first N sequences per task, as text and PNG, and "
        "write them as JSON for tools/report.py",
    )
    group.add_argument(
        "--out",
        type=Path,
        default=Path("eval.json"),
        help="file for JSON records (of prompts: one per line); plots are written to the same"
        " folder",
    )


@dataclass(frozen=True)
class Subject:
    """A model at one history length, with its evaluator."""

    config: RunConfig
    as_trained: bool
    """Whether the model was trained at this length."""
    corpus: RunData
    policies: list[str]
    evaluator: Evaluator
    documents: DocumentReader


@contextmanager
def read_in_batches(
    args: argparse.Namespace, request: Request, seq_len: int | None
) -> Iterator[Subject]:
    """Open a run, checkpoint or bundle, to be evaluated in batches by the training code."""
    device = torch.device(args.device)
    trained = load_trained(args.checkpoint, device=device, seq_len=seq_len, text=request.text)
    names = request.policies_for(trained.config, has_lensnet=trained.lensnet is not None)
    reader = Batches(
        forward=trained.model,
        mc=trained.config.mc,
        controller=trained.controller,
        focus=request.focus(trained.config),
        seed=request.seed,
        batch_size=args.batch_size,
        device=trained.device,
    )
    evaluator = Evaluator(reader, request.retrieval(trained.config))
    with trained.controller.inference():
        yield Subject(
            trained.config,
            trained.as_trained,
            trained.corpus,
            names,
            evaluator,
            DocumentBatches(reader),
        )


@contextmanager
def read_by_sessions(
    args: argparse.Namespace, request: Request, seq_len: int | None
) -> Iterator[Subject]:
    """Open a bundle, to be evaluated with inference sessions."""
    model = load_bundle(args.bundle, device=args.device)
    names = request.policies_for(model.config, has_lensnet=model.lensnet is not None)
    config = model.config if seq_len is None else with_history(model.config, seq_len)
    corpus = open_weights(args.bundle, verify=False).corpus(other=request.text)
    reader = Sessions(
        model=model,
        mc=config.mc,
        focus=request.focus(config),
        seed=request.seed,
        search=args.search,
    )
    evaluator = Evaluator(reader, request.retrieval(config))
    same = config is model.config
    yield Subject(config, same, corpus, names, evaluator, DocumentSessions(reader))


@dataclass
class Results:
    """Records of the evaluation so far, which are also on disk."""

    out: Path
    records: list[Record] = field(default_factory=list)
    foci: list[Focus] = field(default_factory=list)

    def add(self, records: Sequence[Record]) -> None:
        """Add records, and write all records to `out`."""
        self.records += records
        save_records(self.records, self.out)


def measure(subject: Subject, request: Request, results: Results) -> None:
    """Evaluate all tasks at one history length; add records and drawn contexts to `results`.

    All tasks are made first, so that an impossible one raises before anything is measured.
    """
    budgets = request.shares(subject.config.mc)
    tasks = [make_task(name, subject, request, budgets) for name in request.tasks]
    for task in tasks:
        found = subject.evaluator.run(task, subject.policies, budgets, range(request.samples))
        if found:
            results.add(found)
        for name in sorted(set(subject.policies) - {record.policy for record in found}):
            print(
                f"warning: skipped policy {name} on task {task.name}, which has no second question",
                file=sys.stderr,
            )
        for index in range(request.show_focus):
            focus = subject.evaluator.contexts(task, subject.policies, budgets[0], index)
            results.foci.append(focus.with_texts(subject.corpus.tokenizer.decode))
            print("\n".join(focus_lines(results.foci[-1])))


def measure_documents(subject: Subject, request: Request, records: list[StreamRecord]) -> None:
    """Predict documents at one history length, print the tables and add the records to
    `records`.
    """
    specs = specs_of(subject.policies, request.retrieval(subject.config))
    for lines in stream(subject.documents, subject.corpus, specs, request, records):
        print(lines)


def make_task(name: str, subject: Subject, request: Request, budgets: Sequence[float]) -> Task:
    """Return task `name`, with enough facts for the largest budget.

    Prints a warning if the history is too short for that many.
    """
    config, corpus = request.asking(subject.config), subject.corpus
    geometry = config.mc.geometry
    longest = geometry.reachable_at_most(max(budgets) * config.mc.seq_len)
    task = evaluated_task(
        name,
        config,
        corpus,
        corpus.val,
        seed=request.seed,
        wc_length=longest,
        as_trained=subject.as_trained,
    )
    warning = too_few_facts(task, geometry, longest)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    return task


def publish(results: Results, model: str) -> None:
    """Print the table; write plots and focus maps next to the records."""
    records = results.records
    lines = [table(records), *access_lines(record.policy for record in records)]
    lines += settings_lines(records)
    print("\n".join([*lines, *best_query_lines(records), *lens_ratio_lines(records)]))
    stem = results.out.with_suffix("")
    plots = save_plots(results.records, stem)
    if results.foci:
        plots.append(save_focus_plot(results.foci, stem.with_name(f"{stem.name}_focus.png")))
        save_focus_maps(results.foci, model, stem.with_name(f"{stem.name}_focus.json"))
    print(f"records: {results.out}; plots: {', '.join(map(str, plots))}")


def main(argv: list[str]) -> int:
    """Run the program and return its exit code: 0 done, 2 invalid arguments, lengths or tasks.

    After a signal the process exits with 128 + its number. Tasks that were already measured are
    kept in any case.
    """
    args = parse(argv)
    remark = f"the evaluation ends; records of the finished tasks are in {args.out}"
    with StopSignals(speaks=True) as stop, stop.ending_at_once(remark):
        return evaluate(args)


def evaluate(args: argparse.Namespace) -> int:
    """Run the evaluation and return the exit code. After an error, publish what was measured."""
    results = Results(args.out)
    failure: Exception | None = None
    try:
        request = Request.of(args)
        if request.prompts:
            for lines in answers(args, request):
                print(lines)
            return 0
        read = read_by_sessions if args.bundle else read_in_batches
        streamed: list[StreamRecord] = []
        for seq_len in request.seq_lens:
            with read(args, request, seq_len) as subject:
                request.check_lengths(subject.config)
                if request.refocus:
                    measure_documents(subject, request, streamed)
                else:
                    measure(subject, request, results)
        if not results.records and not streamed:
            raise ConfigError(
                f"nothing was measured: none of the policies works on {', '.join(request.tasks)}:"
                " give other --policies or --tasks"
            )
    except (ValueError, OSError) as error:  # a ConfigError is a ValueError
        failure = error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    if results.records:
        publish(results, args.bundle or args.checkpoint)
    if failure is not None:
        print(f"error: {str(failure).partition(chr(10))[0]}", file=sys.stderr)
    return 0 if failure is None else 2


def answers(args: argparse.Namespace, request: Request) -> Iterator[str]:
    """Yield the tables of prompts, which sessions of the bundle answer."""
    return answer(
        args.bundle,
        request,
        device=args.device,
        search=args.search,
        batch_size=args.batch_size,
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether `error` means that the GPU or the host is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


if __name__ == "__main__":
    run_program(main)
