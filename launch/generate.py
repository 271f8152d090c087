"""Continues a text of any length with a bundle.

    python launch/generate.py --bundle runs/demo/bundle "def main("
    python launch/generate.py --bundle runs/demo/bundle --prompt_file book.txt --show_focus
    cat question.txt | python launch/generate.py --bundle runs/demo/bundle --tree runs/book_tree

The text is written to standard output token by token, everything else to standard error. With
--tree FOLDER the history is kept on disk, and the next call with the same folder continues it.
"""

import argparse
import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mc_ds.config import ConfigError
from mc_ds.console import run_program
from mc_ds.drawing import LEGEND, lod_ascii
from mc_ds.inference import SESSION_POLICIES, Ending, Sampling, Session, load_bundle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line of the generation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prompt", nargs="?", help="text to continue; without it and --prompt_file, standard input"
    )
    parser.add_argument(
        "--prompt_file",
        type=Path,
        help="file with the text to continue; a prompt that is also given comes after it",
    )
    parser.add_argument(
        "--bundle",
        required=True,
        help="bundle, made by tools/convert_checkpoint.py or tools/import_hf.py",
    )
    _add_context(parser.add_argument_group("the working context"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_running(parser.add_argument_group("how it runs"))
    return parser.parse_args(argv)


def _add_context(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--policy",
        default=None,
        help=f"{', '.join(SESSION_POLICIES)}; default: lens, without a LensNet recency",
    )
    group.add_argument(
        "--budget",
        type=int,
        default=None,
        help="entries of the working context at most; default: as many as trained with",
    )
    group.add_argument(
        "--search",
        type=int,
        default=None,
        help="blocks that a search brings up, 0 for none; default: in long histories",
    )
    group.add_argument(
        "--tree", default="ram", help="ram, or a folder in which the history is kept; default: ram"
    )
    group.add_argument(
        "--show_focus", action="store_true", help="draw the working context before and after"
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_new_tokens", type=int, default=128, help="tokens written at most; default: 128"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="of sampling; default: 0, the likeliest token",
    )
    group.add_argument(
        "--top_k", type=int, default=None, help="sample among the k likeliest tokens"
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=None,
        help="sample among the likeliest tokens of this probability in all",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of sampling, and of policy random; default: 0"
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device"
    )
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default=None,
        help="of backbone and GistNet; default: as stored",
    )


def read_prompt(args: argparse.Namespace) -> str:
    """Return the text to continue. Raises ConfigError where there is none, or the file cannot be
    read as text.
    """
    parts = []
    try:
        if args.prompt_file is not None:
            parts.append(args.prompt_file.read_text(encoding="utf-8"))
        if args.prompt is not None:
            parts.append(args.prompt)
        if not parts and sys.stdin is not None and not sys.stdin.isatty():
            parts.append(sys.stdin.read())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompt: {args.prompt_file or 'standard input'} cannot be read ({error}): give UTF-8 "
            "text"
        ) from None
    text = "".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates stand for bytes that were not decoded
        raise ConfigError("prompt: it is not all UTF-8: give UTF-8 text") from None
    return text


def ingest(session: Session, document: NDArray[np.int64]) -> None:
    """Append the prompt, as a document where the history begins with it. Raises ConfigError where
    there is nothing to continue.
    """
    prompt = document[1:]
    if not len(prompt) and not len(session):
        raise ConfigError(
            "there is no text to continue: give a prompt, --prompt_file, or standard input"
        )
    session.ingest(prompt if len(session) else document)


def draw(session: Session, label: str) -> str:
    """Return the working context as a line of symbols."""
    lods, starts = session.working_context()
    line = lod_ascii(lods, starts, session.mc.block_size, len(session))
    said = f"{len(lods)} entries for {len(session)} tokens, coverage {session.coverage:.3f}"
    return f"{label:>6} |{line}| {said}"


def generate(args: argparse.Namespace) -> None:
    """Write the continuation. Raises ConfigError for what cannot work, before a tree is opened."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    ending, prompt = Ending(args.max_new_tokens, args.stop), read_prompt(args)
    model = load_bundle(args.bundle, device=args.device, dtype=DTYPES.get(args.dtype))
    assert model.tokenizer is not None, "load_bundle reads one"
    document = model.tokenizer.encode_document(prompt)
    policy = args.policy or ("lens" if model.lensnet is not None else "recency")
    with model.session(
        policy, args.budget, args.tree, seed=args.seed, search=args.search, create=bool(prompt)
    ) as session:
        ingest(session, document)
        if args.show_focus:
            print(LEGEND, draw(session, "before"), sep="\n", file=sys.stderr)
        start, count = time.perf_counter(), 0
        for piece in session.stream(
            ending.max_new_tokens,
            sampling,
            stop=ending.stop,
            stop_ids=[model.tokenizer.separator_id],
        ):
            print(piece.text, end="", flush=True)
            count += 1
        print(flush=True)
        seconds = time.perf_counter() - start
        if args.show_focus:
            print(draw(session, "after"), file=sys.stderr)
        print(
            f"{count} tokens in {seconds:.2f} s ({count / max(seconds, 1e-9):.1f}/s), history "
            f"{len(session)}",
            file=sys.stderr,
        )


def main(argv: list[str]) -> int:
    """Run the program and return its exit code: 0 done, 1 output was closed, 2 bad arguments."""
    args = parse(argv)
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # where the terminal is not UTF-8, some characters cannot be printed
        sys.stdout.reconfigure(errors="replace")
    try:
        generate(args)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the buffered rest has no reader
        return 1
    except (ConfigError, ValueError, OSError) as error:  # OSError: the disk of a tree
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    run_program(main)
