"""Names of files: what can be one; unique names of temporary files and folders, which only this
package makes and recognises.
"""

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["partial", "replaced"]
"""`partial`: incomplete, or about to be removed. `replaced`: the previous version, while the new
one takes its name.
"""
_TOKEN = r"[0-9a-f]{16}"


def temporary(path: Path, kind: Kind) -> Path:
    """Return a new name beside `path`, on the same file system."""
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(8)}")


def temporaries(folder: Path, kind: Kind, name: str | None = None) -> Iterator[tuple[Path, Path]]:
    """Yield the temporary entries of this kind in `folder` with the path that each was made for;
    only those of the entry `name` if given.
    """
    pattern = re.compile(
        rf"({re.escape(name) if name is not None else '.+'})\.{kind}-{_TOKEN}", re.DOTALL
    )
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            yield path, folder / match[1]


def is_name(path: str) -> bool:
    """Return whether a file can have this name or path: no zero byte, no lone surrogate."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
