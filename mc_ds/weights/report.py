"""What a person should know about weights that are used all the same."""

import sys


def warn(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)
