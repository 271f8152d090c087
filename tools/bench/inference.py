"""Measures inference sessions: latency of generation by phase, ingest, and recall of facts planted
in long histories ("needles").

Usage: python tools/bench/inference.py --bundle BUNDLE --device cuda --out bench.json
       python tools/bench/inference.py --random_weights RECIPE --device cuda --needles 0

Latency, for each history length, on random tokens: tokens per second of bulk ingest, time to the
first token (refocus, and decoding of the whole context), and milliseconds per token of greedy
generation, including refocuses and recomputed caches, by phase. `focus_share` is the share of tree,
search, LensNet and allocator.

Needles, for each history length, with a bundle: `--needles` facts are planted at random positions
of text from the training corpus, and `--questions` of them are asked at its end, `--asks` times.
Reported per policy: the share of asked facts that are uncompressed after the refocus, the loss of
their values, and the share of value tokens predicted correctly.

Prints one line per measurement, and writes all as JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.recipe import read_recipe
from mc_ds.config.trained import with_history
from mc_ds.console import HelpFormatter, run_program
from mc_ds.data import RunData
from mc_ds.inference import InferenceModel, MegaContextTree, Session, load_bundle
from mc_ds.model.build import build_networks
from mc_ds.model.device import device_of
from mc_ds.tasks import NUM_KEYS, TaskVocabulary, make_task
from mc_ds.weights.open import open_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Record = dict[str, Any]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model and its sessions, which the benchmarks of sessions share."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", help="bundle to measure")
    source.add_argument(
        "--random_weights",
        metavar="RECIPE",
        help="recipe of an untrained model, for latency only",
    )
    parser.add_argument(
        "--budget", type=int, default=2112, help="maximum entries of the working context"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default=None,
        help="data type of backbone and GistNet; default: as stored, or fp32",
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_options(parser)
    parser.add_argument(
        "--histories",
        default="8192,131072,1048576",
        help="comma-separated history lengths in tokens",
    )
    parser.add_argument("--policy", default="lens", help="policy for latency")
    parser.add_argument(
        "--tokens", type=int, default=512, help="tokens to generate for latency; 0: skip latency"
    )
    parser.add_argument("--tree", default="ram", help="ram, or a new folder for trees on disk")
    parser.add_argument("--search", type=int, default=None, help="blocks that the search proposes")
    parser.add_argument("--needles", type=int, default=128, help="facts to plant; 0: skip needles")
    parser.add_argument(
        "--policies",
        default="lens,lens_no_search,blind,uniform",
        help="comma-separated policies for needles",
    )
    parser.add_argument("--texts", type=int, default=2, help="texts per history length")
    parser.add_argument("--asks", type=int, default=32, help="questions per text")
    parser.add_argument("--questions", type=int, default=1, help="facts that a question asks for")
    parser.add_argument("--seed", type=int, default=0, help="seed of tokens, texts and questions")
    parser.add_argument(
        "--out", type=Path, default=Path("bench_inference.json"), help="JSON file to write"
    )
    return parser.parse_args(argv)


def random_model(recipe: str, device: str, dtype: torch.dtype | None, seed: int) -> InferenceModel:
    """Return an untrained model of a recipe, whose LensNet gives random scores."""
    config, place = RunConfig.model_validate(read_recipe(recipe)), device_of(device)
    torch.manual_seed(seed)
    model, lensnet = build_networks(config, vocab_size=config.data.vocab_size, device=place)
    if lensnet is not None:
        torch.nn.init.normal_(lensnet.head_down.weight, std=0.1)
    return InferenceModel(model.to(place, dtype), lensnet, config)


def wait(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def latency(model: InferenceModel, length: int, args: argparse.Namespace) -> Record:
    """Measure ingest of random tokens, time to the first token, and milliseconds per further token
    by phase.
    """
    tokens = np.random.default_rng([args.seed, length]).integers(
        0, model.nets.shape.vocab_size, length
    )
    where = "ram" if args.tree == "ram" else str(Path(args.tree) / str(length))
    with model.session(args.policy, args.budget, where, search=args.search) as session:
        if len(session):
            raise ConfigError(f"--tree {where} already has tokens: give a new folder")
        started = time.perf_counter()
        session.ingest(tokens)
        wait(model.device)
        ingest = time.perf_counter() - started
        for _ in session.stream(2 * model.mc.block_size):
            pass  # warm up: choose kernels and allocate memory
        session.ingest(tokens[:1])
        wait(model.device)
        arrivals = []
        started = time.perf_counter()
        for count, _ in enumerate(session.stream(args.tokens + 1)):
            arrivals.append(time.perf_counter())  # a yielded token has already reached the host
            if count == 0:
                session.phases.reset()
        phases = session.phases.seconds()
        seconds = np.diff([started, *arrivals]) * 1000
        steps = seconds[1:]
        return {
            "history": length,
            "entries": len(session.working_context()[0]),
            "coverage": session.coverage,
            "ingest_s": ingest,
            "ingest_tokens_per_s": length / ingest,
            "first_token_ms": float(seconds[0]),
            "token_ms": float(steps.mean()),
            "token_ms_median": float(np.median(steps)),
            "token_ms_largest": float(steps.max()),
            "phase_ms_per_token": {
                name: 1000 * value / args.tokens
                for name, value in phases.items()
                if name != "ingest"
            },
            "focus_share": session.phases.focus_share(),
        }


class Haystack:
    """A text with facts `key = value` at random places, and questions about them at its end."""

    def __init__(
        self,
        model: InferenceModel,
        corpus: RunData,
        length: int,
        index: int,
        args: argparse.Namespace,
    ) -> None:
        config = with_history(model.config, length)
        recall = config.data.recall
        self.keys, self.values, self.questions = (
            recall.key_tokens,
            recall.value_tokens,
            args.questions,
        )
        num_keys = max(NUM_KEYS, args.needles) if self.keys == 1 else NUM_KEYS
        task = make_task(
            "recall",
            shards=corpus.train[0].shards,
            tokenizer=corpus.tokenizer,
            mc=config.mc,
            seed=args.seed,
            facts_by_stage=[args.needles],
            num_keys=num_keys,
            questions=args.questions,
            key_tokens=self.keys,
            value_tokens=self.values,
        )
        self.vocabulary = TaskVocabulary.of(corpus.tokenizer, num_keys)
        sample = task.sample(index)
        asked = 2 + args.questions * self.keys
        self.tokens = sample.tokens[: length - config.mc.horizon_tokens + 1 - asked]
        self.facts = np.concatenate([sample.spans, sample.distractors])
        self.facts = self.facts[(self.facts[:, 1] <= len(self.tokens)).nonzero()[0]]

    def ask(
        self, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], list[int], list[int], list[bool]]:
        """Draw facts, and return their spans [questions, 2], the question tokens, the answer
        tokens, and a mask of the answer tokens that are values.
        """
        spans = self.facts[rng.choice(len(self.facts), self.questions, replace=False)]
        facts = [self.tokens[start:stop] for start, stop in spans]
        question = [
            self.vocabulary.question,
            *(token for fact in facts for token in fact[: self.keys]),
            self.vocabulary.newline,
        ]
        is_value = ([False] * (self.keys + 1) + [True] * self.values) * self.questions
        return (
            spans,
            [int(token) for token in question],
            [int(token) for fact in facts for token in fact],
            is_value,
        )


def needle_session(
    model: InferenceModel, name: str, tree: MegaContextTree, args: argparse.Namespace
) -> Session:
    """Return a session with policy `name`.

    Here `lens` and `blind` search at every length; `lens_no_search` is `lens` without search.
    """
    search = False if name == "lens_no_search" else True if args.search is None else args.search
    return model.session(
        name.removesuffix("_no_search"), args.budget, tree, search=search, seed=args.seed
    )


def needles(
    model: InferenceModel, corpus: RunData, length: int, args: argparse.Namespace
) -> Iterator[Record]:
    """Yield a record per policy, for facts asked at the end of texts of `length` tokens."""
    found: dict[str, list[bool]] = {}
    losses: dict[str, list[float]] = {}
    right: dict[str, list[bool]] = {}
    refocus: dict[str, list[float]] = {}
    for index in range(args.texts):
        haystack = Haystack(model, corpus, length, index, args)
        with model.open_tree("ram") as tree:
            tree.append(haystack.tokens)
            for name in args.policies.split(","):
                session, rng = (
                    needle_session(model, name, tree, args),
                    np.random.default_rng([args.seed, index]),
                )
                for _ in range(args.asks):
                    spans, question, answers, is_value = haystack.ask(rng)
                    session.ingest(question)
                    wait(model.device)
                    started = time.perf_counter()
                    session.refocus()
                    wait(model.device)
                    refocus.setdefault(name, []).append(time.perf_counter() - started)
                    found.setdefault(name, []).extend(opened(session, spans))
                    said, values = (
                        session.losses(answers),
                        torch.tensor(is_value, device=model.device),
                    )
                    losses.setdefault(name, []).append(float(said.nll[values].mean()))
                    right.setdefault(name, []).extend(said.correct[values].tolist())
                    session.truncate(len(haystack.tokens))
    for name in found:
        yield {
            "history": length,
            "policy": name,
            "facts": args.needles,
            "asked": len(found[name]),
            "found": statistics.mean(found[name]),
            "loss": statistics.mean(losses[name]),
            "accuracy": statistics.mean(right[name]),
            "refocus_ms": 1000 * statistics.median(refocus[name]),
        }


def opened(session: Session, spans: NDArray[np.int64]) -> list[bool]:
    """Return, for each token span, whether it is completely at LOD0 in the working context."""
    lods, starts = session.working_context()
    read = starts[lods == 0]
    return [bool(np.isin(np.arange(start, stop), read).all()) for start, stop in spans]


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements and return them."""
    dtype = DTYPES.get(args.dtype)
    if args.bundle:
        model = load_bundle(args.bundle, device=args.device, dtype=dtype)
    else:
        model = random_model(args.random_weights, args.device, dtype, args.seed)
    lengths = [int(x) for x in args.histories.split(",")]
    result: dict[str, Any] = {
        "source": args.bundle or args.random_weights,
        "device": (
            torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
        ),
        "torch": str(torch.__version__),
        "dtype": str(model.nets.shape.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "budget": args.budget,
        "block_size": model.mc.block_size,
        "max_lod": model.mc.max_lod,
        "position_scheme": model.mc.position_scheme,
        "latency": [],
        "needles": [],
    }
    if args.tokens:
        once = argparse.Namespace(
            **{**vars(args), "tree": "ram", "tokens": min(args.tokens, 2 * model.mc.block_size)}
        )
        latency(model, min(8192, *lengths), once)  # warm up: do what happens once per process
    for length in lengths if args.tokens else []:
        report(result["latency"], latency(model, length, args))
    if args.bundle and args.needles:
        corpus = open_weights(args.bundle, verify=False).corpus()
        for length in lengths:
            for record in needles(model, corpus, length, args):
                report(result["needles"], record)
    return result


def report(records: list[Record], record: Record) -> None:
    """Append a record to `records`, and print it as a line."""
    records.append(record)
    flat = {key: value for key, value in record.items() if not isinstance(value, dict)}
    nested = {
        key: value
        for part in record.values()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    print(
        "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in {**flat, **nested}.items()
        )
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and return its exit code: 0 done, 2 invalid arguments."""
    args = parse(list(argv))
    try:
        result = bench(args)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run_program(main)
