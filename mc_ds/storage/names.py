"""File names: check whether a name is valid; make and recognise unique names of temporary files and
folders.
"""

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["partial", "replaced"]
"""`partial`: incomplete, or being removed. `replaced`: the previous version, until the new one has
its name.
"""
_TOKEN = r"[0-9a-f]{16}"


def temporary(path: Path, kind: Kind) -> Path:
    """Return a new temporary name beside `path`, on the same file system."""
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(8)}")


def temporaries(folder: Path, kind: Kind, name: str | None = None) -> Iterator[tuple[Path, Path]]:
    """Yield the temporary entries of this kind in `folder`, each with the path that it was made
    for. If `name` is given, only those of that entry.
    """
    pattern = re.compile(
        rf"({re.escape(name) if name is not None else '.+'})\.{kind}-{_TOKEN}", re.DOTALL
    )
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            yield path, folder / match[1]


def is_name(path: str) -> bool:
    """Return whether this can be a file name or path: it has no zero byte and no lone surrogate."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
