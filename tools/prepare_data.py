"""Make a dataset, verified token shards, from text: a CPU job before training.

    python tools/prepare_data.py web.jsonl.gz --text_field content --train_tokenizer --out DATASET
    python tools/prepare_data.py FOLDER 'more/*.parquet' --tokenizer BUNDLE --out DATASET
    zcat corpus.gz | python tools/prepare_data.py - --stdin .jsonl --tokenizer x.model --out DATASET
    python tools/prepare_data.py --inspect DATASET

Reads .txt .md .rst .py .jsonl .ndjson .parquet, each also .gz and .zst. The result is the same
for any number of workers. After a kill the same command goes on from what was encoded.
Exit code: 0 done, 2 for what cannot work, told in one line.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.console import run_program
from mc_ds.data.preparation import PrepareOptions, describe, prepare_dataset
from mc_ds.storage import reason


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Exits with 2 where it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="*", help="files, folders, patterns, or - for stdin")
    parser.add_argument("--out", type=Path, help="folder of the dataset to write")
    parser.add_argument("--text_field", default="text", help="of JSON or Parquet (a.b: nested)")
    parser.add_argument("--stdin", default=".txt", metavar="SUFFIX", help="what stdin is like")
    parser.add_argument(
        "--tokenizer", type=Path, help="bundle, run, dataset, .model, tokenizer.json or its folder"
    )
    parser.add_argument("--train_tokenizer", action="store_true", help="on the training split")
    parser.add_argument("--vocab_size", type=int, default=32768, help="pieces to train")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--on_error", choices=["fail", "skip"], default="fail")
    parser.add_argument("--min_document_tokens", type=int, default=2, metavar="N")
    parser.add_argument("--max_document_tokens", type=int, metavar="N")
    parser.add_argument(
        "--max_document_mb", type=int, default=64, help="of a JSON line or a Parquet row"
    )
    parser.add_argument("--val_fraction", type=float, default=0.01, help="held out")
    parser.add_argument("--licence", default="", metavar="TEXT", help="a note for the manifest")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    parser.add_argument("--inspect", type=Path, metavar="DATASET", help="print what it holds")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="documents to print")
    args = parser.parse_args(argv)
    if args.inspect is None and not (args.inputs and args.out):
        parser.error("give inputs and --out, or --inspect DATASET")
    if args.inspect is None and (args.tokenizer is None) != args.train_tokenizer:
        parser.error("give either --tokenizer or --train_tokenizer")
    if min(args.workers, args.min_document_tokens, args.max_document_mb) < 1:
        parser.error("--workers, --min_document_tokens and --max_document_mb are at least 1")
    return args


def options_of(args: argparse.Namespace) -> PrepareOptions:
    """Return the options of a command line."""
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
    """Prepare or inspect."""
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
    print(f"{out}: ready; see it with python tools/prepare_data.py --inspect {out}")
    return 0


if __name__ == "__main__":
    run_program(main)
