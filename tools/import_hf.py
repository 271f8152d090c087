"""Converts a pretrained model of the Llama family to a bundle, for `train.init_from` or generation.

    python tools/import_hf.py FOLDER OUT       a Hugging Face folder with safetensors
    python tools/import_hf.py FILE.gguf OUT    a GGUF file of llama.cpp (needs `pip install gguf`)

Weights are streamed, one parameter at a time. Exit code: 0 done, 2 if the model cannot be imported.
"""

import argparse
import signal
import sys
import time
from math import prod
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.console import HelpFormatter, run_program
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.export import export_bundle


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("source", type=Path, help="Hugging Face folder, or .gguf file")
    parser.add_argument("out", type=Path, help="folder for the bundle")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="data type of the bundle's weights (default: that of the source; GGUF: fp32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Import the model, print a line about the bundle or the error, and return the exit code."""
    args = parse(argv)
    # Exit by an exception, which removes partial output.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    try:
        bundle = open_bundle(
            export_bundle(args.source, args.out, dtype=args.dtype, overwrite=args.overwrite),
            verify=False,
        )
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(prod(shape) for shape in bundle.parameters.values())
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    print(
        f"{bundle.path}: {count:,} parameters in {bundle.manifest['dtype']}, {size / 1e6:,.1f} MB,"
        f" vocabulary {bundle.vocab_size:,}, sequences of {bundle.config.mc.seq_len:,} tokens;"
        f" took {time.monotonic() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    run_program(main)
