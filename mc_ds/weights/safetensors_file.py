"""Open safetensors files of untrusted origin. The library itself rejects headers that claim more
than the file holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mc_ds.config import ConfigError
from mc_ds.storage import open_regular, reason

POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the small file that Git LFS leaves in place of a large one."""


@contextmanager
def open_tensors(path: Path, *, remedy: str, follow: bool = False) -> Iterator[Any]:
    """Open a safetensors file, memory-mapped. Raises ConfigError, in one line that ends with
    `remedy`, if the file or a tensor requested within the block cannot be read. For `follow` see
    `open_regular`.
    """
    try:
        with open_regular(path, follow=follow) as file:
            if file.read(len(POINTER)) == POINTER:
                raise ConfigError(
                    f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull"
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
    """Raise ConfigError for a path that is not valid UTF-8, which the library does not accept."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{path} is not UTF-8, which paths of safetensors files must be: rename the file or its"
            " folder"
        ) from None


def shape_of(opened: Any, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor in an opened file, without reading it."""
    return tuple(map(int, opened.get_slice(name).get_shape()))
