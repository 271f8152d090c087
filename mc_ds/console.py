"""How a program of `launch/` and `tools/` begins and ends, whatever the terminal and whoever
interrupts it.
"""

import io
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130
"""What shells report for a program that SIGINT has ended."""


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Exit with what `main` makes of the command line, or with 130 after Ctrl-C.

    A character that the output cannot encode is printed as `?`, and each line as soon as it is
    complete.
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
