"""Continues a text of any length with a bundle.

    python launch/generate.py --bundle runs/demo/bundle "def main("
    python launch/generate.py --bundle runs/demo/bundle --prompt_file book.txt --show_focus
    cat question.txt | python launch/generate.py --bundle runs/demo/bundle --tree runs/book_tree

Text is written to standard output token by token, everything else to standard error. With --tree
FOLDER the history is kept on disk; another call with the same folder appends to it.
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
from mc_ds.console import HelpFormatter, run_program
from mc_ds.drawing import legend, lod_ascii
from mc_ds.inference import SESSION_POLICIES, Ending, Sampling, Session, load_bundle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "prompt",
        nargs="?",
        help="text to continue; default: --prompt_file, or else standard input",
    )
    parser.add_argument(
        "--prompt_file",
        type=Path,
        help="file with the text to continue; the argument `prompt`, if given, is appended",
    )
    parser.add_argument(
        "--bundle",
        required=True,
        help="bundle made by tools/convert_checkpoint.py or tools/import_hf.py",
    )
    _add_context(parser.add_argument_group("working context"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_execution(parser.add_argument_group("execution"))
    return parser.parse_args(argv)


def _add_context(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--policy",
        default=None,
        help=f"{', '.join(SESSION_POLICIES)}; default: lens, or recency without a LensNet",
    )
    group.add_argument(
        "--budget",
        type=int,
        default=None,
        help="maximum entries of the working context; default: as trained",
    )
    group.add_argument(
        "--search",
        type=int,
        default=None,
        help="blocks that a search of the history proposes, 0: no search; default: search only long"
        " histories",
    )
    group.add_argument(
        "--tree", default="ram", help="folder that stores the history, or ram; default: ram"
    )
    group.add_argument(
        "--show_focus",
        action="store_true",
        help="draw the working context before and after generation",
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_new_tokens", type=int, default=128, help="maximum tokens to generate; default: 128"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="sampling temperature; default: 0, always the likeliest token",
    )
    group.add_argument(
        "--top_k", type=int, default=None, help="sample only among the k likeliest tokens"
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=None,
        help="sample only among the likeliest tokens with this total probability",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of sampling and of policy random; default: 0"
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text; may be repeated",
    )


def _add_execution(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device"
    )
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default=None,
        help="data type of backbone and GistNet; default: as stored",
    )


def read_prompt(args: argparse.Namespace) -> str:
    """Return the text to continue; may be empty. Raises ConfigError if it cannot be read as
    UTF-8.
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
    except UnicodeEncodeError:  # Python decodes invalid bytes of arguments to surrogates
        raise ConfigError("prompt: contains bytes that are not UTF-8: give UTF-8 text") from None
    return text


def ingest(session: Session, document: NDArray[np.int64]) -> None:
    """Append the prompt to the history, with the document separator if the history is empty.

    Raises ConfigError if there is neither prompt nor history.
    """
    prompt = document[1:]
    if not len(prompt) and not len(session):
        raise ConfigError(
            "there is no text to continue: give a prompt, --prompt_file, or standard input"
        )
    session.ingest(prompt if len(session) else document)


def draw(session: Session, label: str) -> str:
    """Return the working context as a labelled line of symbols."""
    lods, starts = session.working_context()
    line = lod_ascii(lods, starts, session.mc.block_size, len(session))
    size = f"{len(lods)} entries for {len(session)} tokens, coverage {session.coverage:.3f}"
    return f"{label:>6} |{line}| {size}"


def generate(args: argparse.Namespace) -> None:
    """Generate and print the continuation.

    Arguments are checked before the tree is opened: raises ConfigError for invalid ones.
    """
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
            print(legend(session.mc.max_lod), draw(session, "before"), sep="\n", file=sys.stderr)
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
    """Run the program and return its exit code: 0 done, 1 output closed, 2 invalid arguments."""
    args = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that is not UTF-8 cannot show all characters.
        sys.stdout.reconfigure(errors="replace")
    try:
        generate(args)
    except BrokenPipeError:
        # Discard buffered output, which nobody reads any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, ValueError, OSError) as error:  # OSError: e.g. a full disk of the tree
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    run_program(main)
