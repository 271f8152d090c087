"""The entry point of the programs in `launch/` and `tools/`: sets up output, handles Ctrl-C."""

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130
"""Exit code of a program that was ended by SIGINT, as shells report it."""
CLOSED = 141
"""Exit code of a program whose output has no reader any more, as shells report SIGPIPE."""


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Call `main` with the arguments and exit with its return value, with 130 after Ctrl-C, or with
    141 where the reader of the output has closed it, as in `program | head`.

    Characters that the output cannot encode are printed as `?`; every line is flushed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = CLOSED
    sys.exit(code)
