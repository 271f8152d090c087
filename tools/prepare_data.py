"""Makes a dataset of token shards from text, on CPUs, before training.

    python tools/prepare_data.py web.jsonl.gz --text_field content --train_tokenizer --out DATASET
    python tools/prepare_data.py FOLDER 'more/*.parquet' --tokenizer BUNDLE --out DATASET
    zcat corpus.gz | python tools/prepare_data.py - --stdin .jsonl --tokenizer x.model --out DATASET
    python tools/prepare_data.py --inspect DATASET

Reads .txt .md .rst .py .jsonl .ndjson .parquet, each also with .gz and .zst. The result does not
depend on the number of workers. After an interruption the same command resumes. Exit code: 0 done,
2 after an error.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.console import HelpFormatter, run_program
from mc_ds.data.preparation import PrepareOptions, describe, prepare_dataset
from mc_ds.storage import reason


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Exits with 2 if it is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("inputs", nargs="*", help="files, folders, glob patterns, or - for stdin")
    parser.add_argument("--out", type=Path, help="folder for the dataset")
    parser.add_argument(
        "--text_field", default="text", help="JSON field or Parquet column (a.b if nested)"
    )
    parser.add_argument(
        "--stdin", default=".txt", metavar="SUFFIX", help="format of stdin, e.g. .jsonl.gz"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="bundle, run, dataset, .model, tokenizer.json or its folder"
    )
    parser.add_argument(
        "--train_tokenizer", action="store_true", help="train a tokenizer on the training split"
    )
    parser.add_argument(
        "--vocab_size", type=int, default=32768, help="vocabulary of --train_tokenizer"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that encode"
    )
    parser.add_argument(
        "--on_error", choices=["fail", "skip"], default="fail", help="what to do with faulty text"
    )
    parser.add_argument(
        "--min_document_tokens", type=int, default=2, metavar="N", help="skip shorter documents"
    )
    parser.add_argument(
        "--max_document_tokens", type=int, metavar="N", help="skip longer documents"
    )
    parser.add_argument(
        "--max_document_mb", type=int, default=64, help="skip larger JSON lines and Parquet rows"
    )
    parser.add_argument(
        "--val_fraction", type=float, default=0.01, help="share of documents held out"
    )
    parser.add_argument(
        "--licence", default="", metavar="TEXT", help="licence of the text, for the manifest"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument(
        "--inspect", type=Path, metavar="DATASET", help="only describe an existing dataset"
    )
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="documents per split for --inspect"
    )
    args = parser.parse_args(argv)
    if args.inspect is None and not (args.inputs and args.out):
        parser.error("give inputs and --out, or --inspect DATASET")
    if args.inspect is None and (args.tokenizer is None) != args.train_tokenizer:
        parser.error("give either --tokenizer or --train_tokenizer")
    if min(args.workers, args.min_document_tokens, args.max_document_mb) < 1:
        parser.error("--workers, --min_document_tokens and --max_document_mb must be at least 1")
    return args


def options_of(args: argparse.Namespace) -> PrepareOptions:
    """Convert parsed arguments to PrepareOptions."""
    return PrepareOptions(
        inputs=args.inputs,
        out=args.out,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        text_field=args.text_field,
        stdin=args.stdin,
        workers=args.workers,
        on_error=args.on_error,
        min_document_tokens=args.min_document_tokens,
        max_document_tokens=args.max_document_tokens,
        max_document_mb=args.max_document_mb,
        val_fraction=args.val_fraction,
        licence=args.licence,
        overwrite=args.overwrite,
    )


def main(argv: list[str]) -> int:
    """Make or describe a dataset, and return the exit code."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if args.inspect is not None:
            for line in describe(args.inspect, documents=args.show):
                print(line)
            return 0
        out = prepare_dataset(options_of(args))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {args.out}: {reason(error)}", file=sys.stderr)
        return 2
    print(f"{out}: complete; to describe it: python tools/prepare_data.py --inspect {out}")
    return 0


if __name__ == "__main__":
    run_program(main)
