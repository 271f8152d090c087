"""Warnings about weights that are usable with restrictions."""

import sys


def warn(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)
