"""Converts a checkpoint, of any ZeRO stage and number of ranks, to a bundle: a folder with
everything needed for inference.

    python tools/convert_checkpoint.py runs/recall bundles/recall
    python tools/convert_checkpoint.py CHECKPOINT bundles/recall --dtype bf16 --hf hf/recall
    python tools/convert_checkpoint.py runs/recall bundles/recall --note hardware='one H200'
    python tools/convert_checkpoint.py runs/adapted bundles/adapted --lens_from bundles/recall
    python tools/convert_checkpoint.py runs/recall bundles/recall --set mc.recent_tokens=64

Memory use is bounded by the largest parameter, not by the model. After an error no files remain.
"""

import argparse
import signal
import sys
from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.console import HelpFormatter, run_program
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.export import export_bundle


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder of a run (uses its newest checkpoint) or of a checkpoint",
    )
    parser.add_argument("out", type=Path, help="folder for the bundle")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        default=None,
        help="data type of backbone and GistNet; default: as stored (fp32)",
    )
    parser.add_argument(
        "--lens_dtype",
        choices=["fp32", "bf16"],
        default="fp32",
        help="data type of LensNet's weights; it always computes in fp32",
    )
    parser.add_argument(
        "--lens_from",
        type=Path,
        metavar="WEIGHTS",
        help="run, checkpoint or bundle of an earlier state of the backbone, from which GistNet, "
        "LensNet and all settings are taken",
    )
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a setting of inference: mc.recent_tokens, mc.horizon_tokens, or one"
        " of focus or retrieval; may be repeated",
    )
    parser.add_argument(
        "--hf",
        type=Path,
        default=None,
        metavar="OUT_HF",
        help="also write the backbone as a folder for `transformers`",
    )
    parser.add_argument(
        "--note",
        type=note,
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a fact for the model card; may be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="do not verify the checkpoint's files against its manifest",
    )
    return parser.parse_args(argv)


def note(text: str) -> tuple[str, str]:
    """Split NAME=TEXT into name and text, for argparse."""
    return _pair(text, "NAME=TEXT, such as hardware='one NVIDIA H200'")


def setting(text: str) -> tuple[str, str]:
    """Split KEY=VALUE into key and value, for argparse."""
    return _pair(text, "KEY=VALUE, such as mc.recent_tokens=128")


def _pair(text: str, usage: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not (mark and name):
        raise argparse.ArgumentTypeError(f"{text!r}: use {usage}")
    return name, value


def once(option: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Return the values of a repeatable option by name. Raises ConfigError for a repeated name."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"{option} {twice[0]!r} is given {names.count(twice[0])} times: give each name once"
        )
    return dict(pairs)


def main(argv: list[str]) -> int:
    """Run the program and return its exit code: 0 done, 2 if the checkpoint cannot be converted."""
    args = parse(argv)
    # Exit by an exception, which removes partial output.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        export_bundle(
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            lens_dtype=args.lens_dtype,
            verify=not args.no_verify,
            overwrite=args.overwrite,
            notes=once("--note", args.note),
            lens_from=args.lens_from,
            settings=once("--set", args.set),
        )
        bundle = open_bundle(args.out, verify=False)
        size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
        facts = (
            f"{len(bundle.parameters)} tensors in {bundle.manifest['dtype']}, {size / 1e6:,.1f} MB"
        )
        print(f"{args.out}: {bundle.manifest['source']}: {facts}")
        if args.hf is not None:
            from mc_ds.weights.pretrained import export_hf  # needed only for --hf

            print(
                f"{export_hf(bundle, args.hf)}: the backbone, for transformers.AutoModelForCausalLM"
            )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
