"""Measures speed and memory of data preparation, compared with the libraries that it uses.

    python tools/benchmark.py data --json data.jsonl --megabytes 16 --workers 2

The text is the source code of this machine's Python standard library, repeated with a number in
each copy. Our speed and the library's are measured alternately, on the same text; rates are the
best of `--repeats`. Prints a line per result; appends all as one JSON line to FILE.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np

from mc_ds.console import HelpFormatter
from mc_ds.data import DatasetWriter, StdlibCorpus, Tokenizer, open_dataset, train_tokenizer
from mc_ds.data.preparation.encode import make_part
from mc_ds.data.text.plan import make_plan
from mc_ds.data.text.readers import Segment, in_blocks, segments
from mc_ds.data.tokenizer import SentencePieceTokenizer

ROOT = Path(__file__).parents[2]
PREPARE = ROOT / "tools" / "prepare_data.py"
VOCABULARY = 8192
TRAINED_ON = 2_000_000
"""Characters used to train the tokenizer."""
SHARDS = 1000
"""Shards of the dataset whose opening is measured."""
FILES = 20_000
WINDOW = 4097
"""Tokens per loaded sequence."""
Figures = dict[str, float]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the results to this file, as a line"
    )
    parser.add_argument("--megabytes", type=float, default=16, help="megabytes of text")
    parser.add_argument(
        "--input_megabytes",
        type=float,
        metavar="MB",
        help="megabytes of text for the whole preparation, whose memory is measured; default:"
        " --megabytes",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that encode")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions; the best one counts")
    parser.add_argument("--files", type=int, default=FILES, help="number of small files")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run all benchmarks, and print and store the results."""
    args = parse(argv)
    texts = list(some_texts(int(args.megabytes * 1e6)))
    tokenizer = train_tokenizer(some_texts(TRAINED_ON), VOCABULARY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder)
        lines = write_lines(folder / "text.jsonl", args.megabytes)
        figures = {
            **encoding(lines, texts, tokenizer, args.repeats),
            **reading(lines, args.repeats),
        }
        if args.input_megabytes is not None:
            write_lines(lines, args.input_megabytes)
        figures |= {
            **preparation(lines, tokenizer, args.workers),
            **opening(folder, tokenizer, args.repeats),
            **small_files(folder, args.files, args.workers),
        }
    for key, value in figures.items():
        print(f"{key:40} {value:14,.3f}")
    if args.json is not None:
        with args.json.open("a") as file:
            file.write(json.dumps({"benchmark": "data", **vars_of(args), **figures}) + "\n")
    return 0


def vars_of(args: argparse.Namespace) -> dict[str, float]:
    """Return the benchmark's settings, which are stored with its results."""
    return {name: value for name, value in vars(args).items() if name != "json"}


def some_texts(characters: int) -> Iterator[str]:
    """Yield different texts of source code, with at least `characters` in total."""
    files = list(StdlibCorpus(0.05).documents("train"))
    done = 0
    for copy in count():
        for text in files:
            if done >= characters:
                return
            done += len(text)
            yield f"# copy {copy}\n{text}" if copy else text


def write_lines(path: Path, megabytes: float) -> Path:
    """Write `megabytes` of text as JSON lines, without keeping it in memory; return the path."""
    with path.open("w") as file:
        for text in some_texts(int(megabytes * 1e6)):
            file.write(json.dumps({"text": text}) + "\n")
    return path


def best(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Return the shortest time of each function in seconds; they are called alternately."""
    times = [[timed(work) for work in works] for _ in range(repeats)]
    return [min(of_work) for of_work in zip(*times, strict=True)]


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def encoding(lines: Path, texts: list[str], tokenizer: Tokenizer, repeats: int) -> Figures:
    """Measure encoding on one core: a worker's function, and the library's batch call, on the same
    texts.
    """
    assert isinstance(tokenizer, SentencePieceTokenizer)
    (file,) = make_plan([str(lines)]).files
    found = segments(0, file, text_field="text", max_bytes=10**8)
    blocks = list(in_blocks((s for s in found if isinstance(s, Segment)), 1 << 21))
    library = tokenizer._processor
    ours, peer = best(
        repeats,
        lambda: [make_part(block, tokenizer, "text") for block in blocks],
        lambda: library.encode(texts, num_threads=1),
    )
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "encode: worker MB/s": megabytes / ours,
        "encode: sentencepiece batch MB/s": megabytes / peer,
        "encode: share of sentencepiece": peer / ours,
    }


def reading(lines: Path, repeats: int) -> Figures:
    """Measure reading JSON lines on one core, with our reader and with pyarrow's."""
    from pyarrow import json as peer_json

    (file,) = make_plan([str(lines)]).files
    ours, peer = best(
        repeats,
        lambda: list(segments(0, file, text_field="text", max_bytes=10**8)),
        lambda: peer_json.read_json(lines, peer_json.ReadOptions(use_threads=False)),
    )
    megabytes = lines.stat().st_size / 1e6
    return {"read: lines MB/s": megabytes / ours, "read: pyarrow JSON MB/s": megabytes / peer}


def preparation(lines: Path, tokenizer: Tokenizer, workers: int) -> Figures:
    """Measure the speed of a whole preparation, and the memory of its largest process."""
    out, model = lines.with_name("dataset"), lines.with_name(tokenizer.file_name)
    command = [str(lines), "--tokenizer", str(model), "--out", str(out), "--workers", str(workers)]
    seconds, peak = measured(command)
    return {
        "prepare: MB/s, start included": lines.stat().st_size / 1e6 / seconds,
        "prepare: MB of the largest process": peak,
    }


def measured(command: list[str]) -> tuple[float, float]:
    """Run `prepare_data.py`; return its seconds and the peak memory, in MB, of its largest
    process.
    """
    started = time.perf_counter()
    peak = 0.0
    program = [sys.executable, str(PREPARE), *command, "--val_fraction", "0.1"]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, *(peak_memory(pid) for pid in family(process.pid)))
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"prepare_data.py failed with exit code {process.returncode}")
    return time.perf_counter() - started, peak


def family(pid: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    found = [pid]
    for member in found:
        with suppress(OSError):
            for task in Path(f"/proc/{member}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def peak_memory(pid: int) -> float:
    """Return the peak resident memory of a process in MB; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def opening(folder: Path, tokenizer: Tokenizer, repeats: int) -> Figures:
    """Measure opening a dataset of many shards, and loading sequences from it."""
    path, rng = folder / "shards", np.random.default_rng(0)
    path.mkdir()
    with DatasetWriter(path, tokenizer, shard_tokens=WINDOW) as writer:
        for _ in range(SHARDS):
            writer.append("train", rng.integers(VOCABULARY, size=WINDOW))
        writer.finish()
    (seconds,) = best(repeats, lambda: open_dataset(path))
    shards = open_dataset(path).train
    starts = rng.integers(len(shards) - WINDOW, size=20_000).tolist()
    (loading,) = best(repeats, lambda: [shards.window(start, WINDOW) for start in starts])
    return {
        f"open: {SHARDS} shards, s": seconds,
        "load: M tokens/s of one process": len(starts) * WINDOW / loading / 1e6,
    }


def small_files(folder: Path, files: int, workers: int) -> Figures:
    """Measure preparing a folder of small files, and opening the result."""
    source, out = folder / "small", folder / "prepared"
    source.mkdir()
    for number in range(files):
        (source / f"{number}.txt").write_text(f"This is text {number}.\n" * 10)
    tokenizer = str(folder / SentencePieceTokenizer.file_name)
    command = [str(source), "--tokenizer", tokenizer, "--out", str(out), "--workers", str(workers)]
    seconds, _ = measured(command)
    return {
        f"prepare: {files} files, s": seconds,
        f"open: {files} files once prepared, s": timed(lambda: open_dataset(out)),
    }
