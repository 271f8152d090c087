"""The entry point that programs in `launch/` and `tools/` share: output encoding, and Ctrl-C."""

import io
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130
"""Exit code of a program that was ended by SIGINT, as shells report it."""


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Call `main` with the command line and exit with its return value, or with 130 after Ctrl-C.

    A character that the output cannot encode is printed as `?`. Lines are flushed one by one.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)
