"""Names of temporary entries: unique, and recognised by nothing but what makes them."""

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["partial", "replaced"]
"""`partial`: not complete, or about to be removed. `replaced`: the last whole version, while the
new one takes its name.
"""
_TOKEN = r"[0-9a-f]{16}"


def temporary(path: Path, kind: Kind) -> Path:
    """Return a new name beside `path`, on the same file system."""
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(8)}")


def temporaries(folder: Path, kind: Kind, name: str | None = None) -> Iterator[tuple[Path, Path]]:
    """Return temporary entries in `folder`, each with the path that it was made for: `name` there,
    or any.
    """
    pattern = re.compile(
        rf"({re.escape(name) if name is not None else '.+'})\.{kind}-{_TOKEN}", re.DOTALL
    )
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            yield path, folder / match[1]
