"""Opening safetensors files that may come from elsewhere. The library refuses headers that claim
more than the file holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mc_ds.config import ConfigError
from mc_ds.storage import open_regular, reason

POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small file begins that Git LFS leaves in the place of a large one."""


@contextmanager
def open_tensors(path: Path, *, remedy: str, follow: bool = False) -> Iterator[Any]:
    """Open a file of tensors, memory-mapped. Raises ConfigError, in one line that ends with
    `remedy`, where it or what is asked of it cannot be read; `follow` as in `open_regular`.
    """
    try:
        with open_regular(path, follow=follow) as file:
            if file.read(len(POINTER)) == POINTER:
                raise ConfigError(
                    f"{path} is a pointer of Git LFS, not the file itself: git lfs pull"
                )
        _require_utf8(path)
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is not a readable safetensors file ({reason(error)}): {remedy}"
        ) from None


def _require_utf8(path: Path) -> None:
    """Raise ConfigError for a name that the library cannot be given."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{path} is not UTF-8, as names of safetensors files and their folders must be: rename"
            " it"
        ) from None


def shape_of(opened: Any, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor in an opened file, without reading it."""
    return tuple(map(int, opened.get_slice(name).get_shape()))
