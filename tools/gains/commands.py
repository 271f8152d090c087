"""The commands of tools/block_gains.py."""

import argparse
import time
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gains.choices import greedy_losses, policy_losses
from gains.estimate import estimate_lines, left_out_errors, paired
from gains.inputs import FreeVectors, read_inputs
from gains.layout import Layout
from gains.lexical import NAMES, lexical_features
from gains.rankers import Training, captured, score_all, untrained
from gains.reader import Reader
from gains.record import record_window
from gains.store import Raw, encode, fit, read_parts, save, write_parts
from gains.tables import table_lines
from gains.windows import Windows, draw_windows, load_windows, parse_source
from mc_ds.model.device import device_of
from mc_ds.weights.bundle import open_bundle

SIZES = (2, 6, 12)
"""Numbers of recent blocks to replace."""


def windows(args: argparse.Namespace) -> None:
    """Draw windows of tokens and write them to `--windows`."""
    sources = [parse_source(text) for text in args.source]
    tokenizer = open_bundle(args.bundle, verify=False).tokenizer()
    drawn = draw_windows(
        sources, tokenizer, seq_len=8192, characters=tuple(args.characters), seed=args.seed
    )
    drawn.save(args.windows)
    for split, kind in sorted(set(zip(drawn.split, drawn.kind, strict=True))):
        print(f"{split} {kind}: {np.sum((drawn.split == split) & (drawn.kind == kind))} windows")


def layout_of(args: argparse.Namespace) -> Layout:
    """Return the layout given by the arguments."""
    return Layout(**{field.name: getattr(args, field.name) for field in fields(Layout)})


def reader_of(args: argparse.Namespace) -> Reader:
    """Load the backbone of `--bundle` and return its reader."""
    layout = layout_of(args)
    device = device_of(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, _ = open_bundle(args.bundle, verify=False).load(device=device, dtype=dtype)
    return Reader(model.backbone, layout, rows=args.rows, compiled=args.compile)


def record(args: argparse.Namespace) -> None:
    """Record test windows with all distant blocks, then training windows with random ones."""
    reader, drawn = reader_of(args), load_windows(args.windows)
    layout, rng = reader.layout, np.random.default_rng(0)
    order = [*drawn.of("test"), *rng.permutation(drawn.of("train"))][: args.limit]
    raws: list[Raw] = []
    started = time.monotonic()
    for number in order:
        if time.monotonic() - started > args.seconds:
            break
        distant = torch.arange(layout.distant)
        if drawn.split[number] == "train":
            drawn_blocks = rng.choice(layout.distant, args.candidates, replace=False)
            distant = torch.from_numpy(np.sort(drawn_blocks))
        ids = torch.from_numpy(drawn.ids[number].astype(np.int64)).to(reader.device)
        found = record_window(reader, ids, distant.to(reader.device), tuple(args.states_after))
        raws.append(Raw(int(number), distant, found.kept(distant)))
        if len(raws) in (1, 2, 4) or len(raws) % 32 == 0:
            print(f"{len(raws)} windows, {time.monotonic() - started:.1f} s", flush=True)
    training = [raw for raw in raws if drawn.split[raw.window] == "train"]
    codec = fit(training, width=args.width, heads=args.heads)
    paths = write_parts(args.out, [encode(raw, codec) for raw in raws])
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in paths)
    print(f"heads: local {codec.local_heads.tolist()}, full {codec.full_heads.tolist()}\n{sizes}")
    print(
        f"{len(raws)} windows, {len(training)} of them for training, recorded in"
        f" {time.monotonic() - started:.1f} s"
    )


def rank(args: argparse.Namespace) -> None:
    """Train all rankers on the training windows, and score the test windows' distant blocks."""
    torch.set_num_threads(args.threads)
    drawn, layout = load_windows(args.windows), layout_of(args)
    recorded = read_parts(args.recording)
    splits = {
        split: [w for w in recorded if drawn.split[int(w["window"])] == split]
        for split in ("train", "test")
    }
    embedding = open_bundle(args.bundle, verify=False).weight("backbone.embedding.weight")
    numbers = [int(window["window"]) for window in splits["train"]]
    vectors = FreeVectors(embedding, drawn, numbers, layout, width=args.width)
    inputs = {split: read_inputs(part, drawn, layout, vectors) for split, part in splits.items()}
    training = Training(epochs=args.epochs, seeds=args.seeds)
    scores = untrained(inputs["test"])
    started = time.monotonic()
    for name, table in score_all(inputs["train"], inputs["test"], training):
        scores[name] = table
        single = [captured(table, inputs["test"].gains, size).mean() for size in (1, *SIZES)]
        found = " ".join(f"{float(gain):+.4f}" for gain in single)
        print(f"{name:24s} {found}  {time.monotonic() - started:.0f} s", flush=True)
    tested = [int(window["window"]) for window in splits["test"]]
    save(args.out, {"windows": tested} | {k: v.half().numpy() for k, v in scores.items()})


def measure(args: argparse.Namespace) -> None:
    """Measure the losses, in the test windows, with the distant blocks that each policy chooses."""
    if args.greedy and not args.recording:
        raise ValueError("--greedy needs recorded gains: give --recording too")
    reader, drawn = reader_of(args), load_windows(args.windows)
    recorded = {int(w["window"]): w for w in read_parts(args.recording)} if args.recording else {}
    ranked = dict(np.load(args.scores)) if args.scores else {}
    place = {int(number): row for row, number in enumerate(ranked.get("windows", ()))}
    known = recorded or place
    numbers = [int(n) for n in drawn.of("test") if not known or int(n) in known][: args.limit]
    found: dict[str, list[torch.Tensor]] = {"losses": [], "recency": [], "greedy": []}
    started = time.monotonic()
    for number in numbers:
        ids = torch.from_numpy(drawn.ids[number].astype(np.int64)).to(reader.device)
        scores = {k: table[place[number]] for k, table in ranked.items() if k != "windows"}
        if recorded or not ranked:
            scores |= word_scores(drawn.ids[number], reader.layout)
        if recorded:
            window = recorded[number]
            scores |= {"attention": window["full_mean"], "oracle": window["gains"]}
        if args.greedy:
            gains = torch.from_numpy(window["gains"].astype(np.float32))
            found["greedy"].append(greedy_losses(reader, ids, gains, args.greedy, SIZES[1]))
        stacked = torch.from_numpy(np.stack([np.asarray(s, np.float32) for s in scores.values()]))
        losses, recency = policy_losses(reader, ids, stacked.to(reader.device), SIZES)
        found["losses"].append(losses)
        found["recency"].append(recency)
    arrays: dict[str, Any] = {k: torch.stack(x).cpu().numpy() for k, x in found.items() if x}
    if recorded:
        arrays["full"] = np.stack([recorded[n]["full"] for n in numbers])
    arrays |= {"windows": numbers, "policies": list(scores), "sizes": SIZES}
    save(args.out, arrays | {"greedy_slices": list(args.greedy)})
    print(f"{len(numbers)} windows, {len(scores)} policies in {time.monotonic() - started:.1f} s")


def word_scores(ids: NDArray[np.uint16], layout: Layout) -> dict[str, NDArray[np.float32]]:
    """Return the scores [S, M] of the lexical policies for one window, by name."""
    features = np.moveaxis(lexical_features(ids, layout), 2, 0)
    words = dict(zip(NAMES, features, strict=True))
    return {name: words[name] for name in ("bm25_16", "bm25_48", "ngram_3")}


def table(args: argparse.Namespace) -> None:
    """Print losses minus those of the recency window, with errors clustered by window."""
    drawn = load_windows(args.windows)
    for kind in sorted(set(drawn.kind)):
        for path in args.losses:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            rows = drawn.kind[arrays["windows"]] == kind
            print(f"\n{kind}, measured: {path}")
            print(*table_lines(arrays, rows), sep="\n")
            if args.recording and "full" in arrays:
                show_estimates(args, drawn, arrays, rows)


def show_estimates(
    args: argparse.Namespace,
    drawn: Windows,
    arrays: dict[str, NDArray[np.generic]],
    rows: NDArray[np.bool_],
) -> None:
    """Print losses with each policy's best block (measured) and with several blocks (estimated)."""
    numbers = [int(number) for number in arrays["windows"][rows]]
    recorded = {int(window["window"]): window for window in read_parts(args.recording)}
    gains = np.stack([recorded[n]["gains"] for n in numbers]).astype(np.float64)
    layout = layout_of(args)
    words = [word_scores(drawn.ids[n], layout) for n in numbers]
    scores = {name: np.stack([w[name] for w in words]).astype(np.float64) for name in words[0]}
    scores["attention"] = np.stack([recorded[n]["full_mean"] for n in numbers]).astype(np.float64)
    scores["oracle"] = gains
    gained = np.asarray(arrays["recency"])[rows, :, None, None] - np.asarray(arrays["losses"])[rows]
    policies = [str(name) for name in arrays["policies"]]
    measured = {name: gained[:, :, policies.index(name)].astype(np.float64) for name in scores}
    if args.scores:
        ranked = dict(np.load(args.scores))
        place = {int(number): row for row, number in enumerate(ranked.pop("windows"))}
        order = [place[number] for number in numbers]
        scores |= {name: ranked[name][order].astype(np.float64) for name in ranked}
    sizes = [int(size) for size in arrays["sizes"]]
    print(f"one block (measured), {sizes} blocks (estimated)")
    print(*estimate_lines(scores, gains, measured, sizes), sep="\n")
    print(
        "error of a policy's estimate (estimated - measured gain) if fitted on the other policies"
    )
    print(*left_out_errors(scores, gains, measured, sizes), sep="\n")
    print("one block, relative to bm25_16 (measured)")
    print(*paired(scores, gains, "bm25_16"), sep="\n")
