"""Times decoding: sessions over short and long histories beside transformers' `generate`, with the
same weights and as many entries of context.

Usage: python tools/benchmark.py infer --random_weights RECIPE --device cuda --json bench.jsonl
       python tools/benchmark.py infer --bundle BUNDLE --device cuda --json bench.jsonl

Both generate greedily, after a context of `--budget` entries: transformers reads as many random
tokens; a session reads a history of random tokens as gists and tokens, refocuses every min(K, h)
tokens (`--refocus`: every r), and searches long histories. All alternate within one process,
`--repeats` times, after an uncounted run of each. The peers are transformers' default (a cache that
grows, `dynamic`) and its static cache, whose step transformers compiles on a GPU (`static`).

Appends one JSON line. `token_ms` is the time of all tokens after the first, refocuses and searches
included, divided by their number; `first_token_ms` that of the first one (refocus, search, reading
of the context); `token_ms_with_first` the mean over both. `focus_share_of_decoding` is the time of
all phases except decoding, the recomputed cache included, divided by that of decoding.
`largest_loss_difference`, in nats, compares the losses of session and peer on one text.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench.inference import DTYPES, add_model_options, random_model, wait

import mc_ds
from mc_ds.config import ConfigError
from mc_ds.console import HelpFormatter, run_program
from mc_ds.inference import InferenceModel, Session, load_bundle
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.weights.pretrained.llama import hf_config, hf_names, part_rows

PEERS = ("dynamic", "static")
"""Caches of transformers' `generate`; `dynamic` is its default."""
COMPARED = 8
"""Largest number of tokens whose losses are compared."""

Record = dict[str, Any]
Generation = Callable[[], Record]
"""Generates, and returns `first_token_ms`, `token_ms` and other figures."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_options(parser)
    parser.add_argument(
        "--json", type=Path, required=True, help="file to which the results are appended, as a line"
    )
    parser.add_argument(
        "--histories",
        default="8192,1048576",
        help="comma-separated history lengths of the sessions, in tokens; empty: none",
    )
    parser.add_argument("--policy", default="lens", help="policy of the sessions")
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens to generate after the first one"
    )
    parser.add_argument("--repeats", type=int, default=3, help="counted generations of each")
    parser.add_argument(
        "--peers", default="dynamic", help=f"comma-separated, of {', '.join(PEERS)}; empty: none"
    )
    parser.add_argument(
        "--refocus",
        default="",
        help="comma-separated numbers of tokens r between refocuses, each measured; empty: the "
        "default of sessions. Where the model's contexts have no room for r tokens, they get it",
    )
    parser.add_argument(
        "--eager", action="store_true", help="also measure the sessions without CUDA graphs"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tokens")
    return parser.parse_args(argv)


def read_model(args: argparse.Namespace) -> InferenceModel:
    """Return the model to measure."""
    dtype = DTYPES.get(args.dtype)
    if args.bundle:
        return load_bundle(args.bundle, device=args.device, dtype=dtype)
    return random_model(args.random_weights, args.device, dtype, args.seed)


def random_tokens(model: InferenceModel, length: int, seed: int) -> np.ndarray:
    """Return random token ids [length], which depend on length and seed."""
    vocabulary = model.nets.shape.vocab_size
    return np.random.default_rng([seed, length]).integers(0, vocabulary, length)


def transformers_llama(model: MegaContextModel, context_len: int) -> Any:
    """Return transformers' Llama with a copy of the backbone's weights."""
    import transformers

    backbone, weight = model.backbone, model.backbone.embedding.weight
    shape = hf_config(backbone.config, vocab_size=weight.size(0), context_len=context_len)
    with weight.device:
        llama = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**shape), dtype=weight.dtype
        ).eval()
    named = dict(llama.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in backbone.named_parameters(prefix="backbone"):
            rows = part_rows(name, tuple(tensor.shape), backbone.config)
            for part, piece in zip(hf_names(name), tensor.split(rows), strict=True):
                named.pop(part).copy_(piece)
    tied = {"lm_head.weight"} if backbone.config.tie_embeddings else set()
    assert set(named) <= tied, f"weights that are not ours: {sorted(named)}"
    # Random weights must not end a generation early.
    llama.generation_config.eos_token_id = None
    return llama


def loss_difference(model: InferenceModel, llama: Any, budget: int, seed: int) -> float:
    """Return the largest difference in nats between the losses of a session and of transformers on
    the last tokens of one text, which both read as tokens.
    """
    context, count = budget - model.mc.horizon_tokens, min(COMPARED, model.mc.horizon_tokens)
    text = random_tokens(model, context + count, seed)
    with model.session("recency", budget) as session:
        session.ingest(text[:context])
        ours = session.losses(text[context:]).nll
    with torch.no_grad():
        ids = torch.from_numpy(text)[None].to(model.device)
        logits = llama(ids, logits_to_keep=count + 1).logits[0, :-1].float()
        theirs = F.cross_entropy(logits, ids[0, -count:], reduction="none")
    return float((ours - theirs).abs().max())


def with_room(model: InferenceModel, tokens: int) -> InferenceModel:
    """Return the model, or if its contexts have no room for that many tokens, the same networks
    with longer contexts: LensNet sees the same tail.
    """
    added = tokens - model.mc.horizon_tokens
    if added <= 0:
        return model
    longer = {
        "horizon_tokens": tokens,
        "recent_tokens": model.mc.recent_tokens + added,
    }
    config = model.config.model_copy(update={"mc": model.mc.model_copy(update=longer)})
    return InferenceModel(model.model, model.lensnet, config, cuda_graphs=model.cuda_graphs)


def session_run(session: Session, length: int, new_tokens: int) -> Generation:
    """Return what continues the first `length` tokens of a session's history."""
    device = session.reader.networks.device

    def generate() -> Record:
        session.truncate(length - 1)
        session.reader.row.cut(0, session.mc.block_size)  # read the whole context again
        session.ingest([0])
        wait(device)
        begun = time.perf_counter()
        arrivals = []
        for count, _ in enumerate(session.stream(new_tokens + 1)):
            arrivals.append(time.perf_counter())  # a yielded token has already reached the host
            if count == 0:
                session.phases.reset()
        seconds = session.phases.seconds()
        seconds.pop("ingest")
        decoding = seconds["decode"]
        return {
            "first_token_ms": 1e3 * (arrivals[0] - begun),
            "token_ms_with_first": 1e3 * (arrivals[-1] - begun) / (new_tokens + 1),
            "token_ms": 1e3 * (arrivals[-1] - arrivals[0]) / new_tokens,
            "token_ms_median": 1e3 * float(np.median(np.diff(arrivals))),
            "phase_ms_per_token": {
                name: 1e3 * value / new_tokens for name, value in seconds.items()
            },
            "focus_share_of_decoding": (sum(seconds.values()) - decoding) / decoding,
        }

    return generate


def peer_run(llama: Any, ids: torch.Tensor, new_tokens: int, cache: str) -> Generation:
    """Return what continues `ids` [1, W] with transformers' `generate`."""
    from transformers import StoppingCriteriaList

    begun = first = 0.0
    goes_on = torch.zeros(1, dtype=torch.bool, device=ids.device)
    mask = torch.ones_like(ids)
    options = {} if cache == "dynamic" else {"cache_implementation": cache}

    def note_first(*_: Any, **__: Any) -> torch.Tensor:
        nonlocal first
        if not first:
            wait(ids.device)
            first = time.perf_counter()
        return goes_on

    def generate() -> Record:
        nonlocal begun, first
        wait(ids.device)
        begun, first = time.perf_counter(), 0.0
        found = llama.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens + 1,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([note_first]),
            **options,
        )
        wait(ids.device)
        ended = time.perf_counter()
        assert found.size(1) == ids.size(1) + new_tokens + 1, "the generation ended early"
        return {
            "first_token_ms": 1e3 * (first - begun),
            "token_ms_with_first": 1e3 * (ended - begun) / (new_tokens + 1),
            "token_ms": 1e3 * (ended - first) / new_tokens,
        }

    return generate


def measure(runs: dict[str, Generation], repeats: int) -> dict[str, Record]:
    """Run each once, and then all in turn `repeats` times. Return medians, and the smallest and
    largest time per token.
    """
    for run in runs.values():
        run()
    records: dict[str, list[Record]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            records[name].append(run())
    return {name: summary(of_run) for name, of_run in records.items()}


def summary(records: list[Record]) -> Record:
    """Return the medians of a run's repetitions, and the spread of its time per token."""
    result: Record = {}
    for key, value in records[0].items():
        if isinstance(value, dict):
            parts = {name: [record[key][name] for record in records] for name in value}
            result[key] = {name: statistics.median(values) for name, values in parts.items()}
        else:
            result[key] = statistics.median(record[key] for record in records)
    times = [record["token_ms"] for record in records]
    return result | {
        "token_ms_min_max": [min(times), max(times)],
        "tokens_per_s": 1e3 / result["token_ms"],
    }


def bench(args: argparse.Namespace) -> Record:
    """Run all measurements and return them."""
    peers = [name for name in args.peers.split(",") if name]
    if unknown := set(peers) - set(PEERS):
        raise ConfigError(f"--peers {', '.join(sorted(unknown))}: use {' or '.join(PEERS)}")
    model = read_model(args)
    result = describe(model, args, with_peers=bool(peers))
    runs: dict[str, Generation] = {}
    if peers:
        context_len = args.budget + args.tokens + 1
        llama = transformers_llama(model.model, context_len)
        result["largest_loss_difference"] = loss_difference(model, llama, args.budget, args.seed)
        ids = torch.from_numpy(random_tokens(model, args.budget, args.seed))[None].to(model.device)
        runs |= {name: peer_run(llama, ids, args.tokens, name) for name in peers}
    models = {"session": model}
    if args.eager:
        models["eager session"] = InferenceModel(
            model.model, model.lensnet, model.config, cuda_graphs=False
        )
    sessions = []
    intervals: list[int | None] = [int(every) for every in args.refocus.split(",") if every]
    for length in map(int, filter(None, args.histories.split(","))):
        for name, of_kind in models.items():
            for every in intervals or [None]:
                roomy = with_room(of_kind, every or 0)
                session = roomy.session(args.policy, args.budget, refocus=every)
                session.ingest(random_tokens(model, length, args.seed))
                sessions.append(session)
                run = f"{name}, {length}" + (f", r = {every}" if every else "")
                runs[run] = session_run(session, length, args.tokens)
    result["runs"] = measure(runs, args.repeats)
    result["entries"] = [len(session.working_context()[0]) for session in sessions]
    if model.device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated(model.device) / 2**30
    return result


def describe(model: InferenceModel, args: argparse.Namespace, *, with_peers: bool) -> Record:
    """Return facts about model, settings, hardware and versions."""
    on_gpu = model.device.type == "cuda"
    parts = {"backbone": model.model.backbone, "gistnet": model.model.gistnet}
    return {
        "benchmark": "infer",
        "source": args.bundle or args.random_weights,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        "versions": {"mc_ds": mc_ds.__version__, "torch": str(torch.__version__)}
        | ({"transformers": version("transformers")} if with_peers else {})
        | {"python": platform.python_version()},
        "dtype": str(model.nets.shape.dtype).removeprefix("torch."),
        "parameters": {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in (parts | {"lensnet": model.lensnet}).items()
            if part is not None
        },
        **{name: getattr(args, name) for name in ("budget", "policy", "tokens", "repeats", "seed")},
        "block_size": model.mc.block_size,
        "max_lod": model.mc.max_lod,
    }


def main(argv: list[str]) -> int:
    """Run the benchmark and return its exit code: 0 done, 2 invalid arguments."""
    args = parse(argv)
    try:
        result = bench(args)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, record in result["runs"].items():
        low, high = record["token_ms_min_max"]
        print(
            f"{name:24} {record['token_ms']:8.3f} ms per token ({low:.3f} to {high:.3f}), "
            f"first token {record['first_token_ms']:.1f} ms"
        )
        if "phase_ms_per_token" in record:
            parts = record["phase_ms_per_token"].items()
            print(
                f"{'':24} {', '.join(f'{phase} {value:.3f}' for phase, value in parts)}; "
                f"focus {record['focus_share_of_decoding']:.1%} of decoding"
            )
    line = json.dumps(result)
    with args.json.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    print(line)
    return 0


if __name__ == "__main__":
    run_program(main)
