"""The entry point of the programs in `launch/` and `tools/`: sets up output, handles Ctrl-C."""

import atexit
import io
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
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
    if _native_threads:
        _end(code)
    sys.exit(code)


_native_threads = False


def has_native_threads() -> None:
    """Tell `run_program` that native threads may hold Python objects, as those of a process group
    do: it then runs the exit handlers and ends the process without finalizing the interpreter.

    A thread that releases such an object while the interpreter is finalized aborts the process,
    although its work is done.
    """
    global _native_threads
    _native_threads = True


def _end(code: int) -> NoReturn:
    """Exit as Python does, up to finalizing the interpreter."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
