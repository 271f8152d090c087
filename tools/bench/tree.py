"""Measures a MegaContext tree: speed of bulk ingest, of appending single tokens, of gathering a
working context and of searching, and memory.

Usage: python tools/bench/tree.py --tree /tmp/tree --tokens 10_000_000    (a small random model)
       python tools/bench/tree.py --bundle runs/demo/bundle --tree ram --device cuda

Prints one JSON object. Memory is the peak of resident memory in MB, during ingest and during use of
the finished tree, minus that after the networks were built. A tree in a folder is kept, and grows
to `--tokens` if it has fewer.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mc_ds.config import BackboneConfig, ConfigError, MCConfig, RunConfig
from mc_ds.console import HelpFormatter, run_program
from mc_ds.inference.tree.checksums import Checksums
from mc_ds.inference.tree.disk import open_tree
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.model.build import build_networks
from mc_ds.model.device import device_of
from mc_ds.weights.open import open_weights

APPENDED = 2**20
"""Tokens per call of `append` during ingest."""
SLICE_ROWS = 2**16
"""Number of index vectors per slice of a search."""
QUERIES, ROUNDS = 64, 10
"""Query vectors per search, and repetitions of every measurement after ingest."""


class Memory:
    """Measures the growth of this process's resident memory since construction (Linux)."""

    def __init__(self) -> None:
        self.before = self._field("VmRSS")

    def restart_peak(self) -> None:
        """Reset the peak."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """Return the peak in MB, minus the memory at construction."""
        return round(self._field("VmHWM") - self.before, 1)

    def _field(self, name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    try:
        print(json.dumps(measure(parse(arguments)), indent=1))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--tree", default="ram", help="folder that stores the tree, or ram")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to ingest")
    parser.add_argument(
        "--bundle", help="bundle's folder; default: random networks with the sizes below"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--wc_length",
        type=int,
        default=2112,
        help="entries of the working context",
    )
    parser.add_argument("--dim", type=int, default=256, help="width of the backbone")
    parser.add_argument("--gist_dim", type=int, default=64, help="width of GistNet")
    parser.add_argument("--gist_layers", type=int, default=2, help="blocks of GistNet")
    parser.add_argument("--lens_dim", type=int, default=256, help="width of the index vectors")
    parser.add_argument("--block_size", type=int, default=32, help="tokens per gist")
    parser.add_argument("--max_lod", type=int, default=2, help="levels of gists")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="size of the vocabulary")
    return parser.parse_args(arguments)


def networks(options: argparse.Namespace) -> tuple[TreeNets, str, str]:
    """Return the networks, and the hashes of GistNet and of the index."""
    device = device_of(options.device)
    if options.bundle:
        weights = open_weights(options.bundle)
        return TreeNets.of(*weights.load(device=device)), *weights.tree_hashes()
    torch.manual_seed(0)
    names = ("gist_dim", "gist_layers", "lens_dim", "block_size", "max_lod")
    mc = MCConfig(**{name: getattr(options, name) for name in names})
    shape = BackboneConfig(dim=options.dim, num_layers=1, num_heads=1, num_kv_heads=1, ffn_dim=64)
    model, lensnet = build_networks(
        RunConfig(mc=mc, backbone=shape), vocab_size=options.vocab_size, device=device
    )
    assert lensnet is not None
    return TreeNets.of(model.eval(), lensnet.eval()), "random networks", "random networks"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements and return the results."""
    nets, gistnet_hash, index_hash = networks(options)
    memory = Memory()
    tree = open_tree(options.tree, nets, gistnet_hash=gistnet_hash, index_hash=index_hash)
    figures: dict[str, Any] = {
        "tree": options.tree,
        "device": str(nets.device),
        "shape": str(nets.shape),
        "tokens_before": len(tree),
    }
    memory.restart_peak()
    checksums_s = timed_checksums()
    started = time.perf_counter()
    while (first := len(tree)) < options.tokens:
        rng = np.random.default_rng(first)
        tree.append(
            rng.integers(
                nets.shape.vocab_size, size=min(APPENDED, options.tokens - first), dtype=np.int32
            )
        )
    tree.commit()
    wait(nets)
    seconds = time.perf_counter() - started
    figures |= {"tokens": len(tree), "ingest_s": round(seconds, 2), "ingest_peak_mb": memory.peak()}
    figures["checksums_share_of_ingest"] = round(sum(checksums_s) / seconds, 4)
    figures["ingest_tokens_per_s"] = round((len(tree) - figures["tokens_before"]) / seconds)
    memory.restart_peak()
    figures |= use(tree, options.wc_length)
    figures["use_peak_mb"] = memory.peak()
    if options.tree != "ram":
        figures["files_mb"] = {
            path.name: round(path.stat().st_size / 2**20, 1)
            for path in sorted(Path(options.tree).iterdir())
        }
    tree.close()
    return figures


def timed_checksums() -> list[float]:
    """Patch `Checksums.add`, and return the list to which it appends its seconds."""
    seconds: list[float] = []
    add = Checksums.add

    def timed_add(self: Checksums, data: memoryview) -> None:
        started = time.perf_counter()
        add(self, data)
        seconds.append(time.perf_counter() - started)

    Checksums.add = timed_add  # type: ignore[method-assign]
    return seconds


def use(tree: MegaContextTree, wc_length: int) -> dict[str, float]:
    """Measure the operations that a session runs every K tokens; return median times in ms (in
    microseconds for appending single tokens).
    """
    block, rng = tree.shape.block_size, np.random.default_rng(0)
    nodes = rng.integers(tree.level_len(1), size=(ROUNDS, wc_length // 2))
    opened = rng.integers(tree.level_len(1), size=(ROUNDS, wc_length // 2 // block))
    queries = torch.randn(tree.shape.index_width, QUERIES, device=tree.device)
    times: dict[str, list[float]] = {
        "append_us": [],
        "entries_ms": [],
        "indexed_entries_ms": [],
        "search_ms": [],
    }
    for round_ in range(ROUNDS):
        spans = (opened[round_][:, None] * block + np.arange(block)).ravel()
        starts = torch.from_numpy(np.concatenate([np.sort(nodes[round_]) * block, spans]))
        lods = torch.cat(
            [
                torch.ones(nodes.shape[1], dtype=torch.int64),
                torch.zeros(len(spans), dtype=torch.int64),
            ]
        )
        ids = rng.integers(tree.shape.vocab_size, size=block).tolist()
        times["append_us"].append(1e3 * timed(tree, partial(append_singly, tree, ids)) / block)
        times["entries_ms"].append(timed(tree, partial(tree.entries, lods, starts)))
        indexed = partial(tree.indexed_entries, lods, starts)
        times["indexed_entries_ms"].append(timed(tree, indexed))
        times["search_ms"].append(timed(tree, partial(search, tree, queries)))
    return {name: round(float(np.median(values)), 3) for name, values in times.items()}


def append_singly(tree: MegaContextTree, ids: list[int]) -> None:
    """Append tokens one by one, as in generation."""
    for token in ids:
        tree.append([token])


def search(tree: MegaContextTree, queries_IQ: torch.Tensor) -> torch.Tensor:
    """Return the best match of each LOD1 node with any query, [n_1]."""
    slices = [
        range(first, min(first + SLICE_ROWS, tree.level_len(1)))
        for first in range(0, tree.level_len(1), SLICE_ROWS)
    ]
    return torch.cat(
        [
            (tree.index_table(1, rows.start, rows.stop).to(tree.device) @ queries_IQ).amax(dim=1)
            for rows in slices
        ]
    )


def timed(tree: MegaContextTree, work: Callable[[], object]) -> float:
    """Return the milliseconds that `work` takes."""
    wait(tree.nets)
    started = time.perf_counter()
    work()
    wait(tree.nets)
    return 1e3 * (time.perf_counter() - started)


def wait(nets: TreeNets) -> None:
    """Wait until the device has finished all work."""
    if nets.device.type == "cuda":
        torch.cuda.synchronize(nets.device)


if __name__ == "__main__":
    run_program(main)
