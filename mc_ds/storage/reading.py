"""Read files of untrusted origin: regular files only, JSON of a bounded size."""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from mc_ds.config.errors import ConfigError
from mc_ds.storage.names import is_name

MAX_JSON_BYTES = 16 << 20
"""Largest size of a JSON file. Its Python objects take up to 30 times as much memory."""


def path_of(where: object) -> Path:
    """Return `where` as a path. Raises ConfigError if it cannot name a file."""
    if not isinstance(where, str | Path) or not is_name(str(where)):
        raise ConfigError(f"{where!r} is not a path: give the name of a file or folder")
    return Path(where)


def open_regular(path: Path, *, follow: bool = False) -> io.BufferedReader:
    """Open a file for reading. Raises OSError if it is not a regular file, which might never end,
    and, unless `follow` is set, for a symbolic link, which could refer to any file of the machine.
    """
    links = 0 if follow else os.O_NOFOLLOW
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | links)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            what = "it is a link, not a file: copy it with cp -L"
            raise OSError(errno.ELOOP, what, str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_json_bytes(path: Path, *, follow: bool = False) -> bytes:
    """Return the content of a JSON file. Raises OSError if it cannot be read, ValueError if it is
    larger than `MAX_JSON_BYTES`.
    """
    with open_regular(path, follow=follow) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES >> 20} MiB")
    return content


def reason(error: BaseException) -> str:
    """Return an error as one line: for a system error its description and file, else type and first
    line of its message.
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
    return f"{type(error).__name__}: {first_line}"


def read_json(path: Path, *, remedy: str, follow: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ConfigError, one line that ends with `remedy`, if it
    cannot be read or is not an object.
    """
    try:
        content = json.loads(read_json_bytes(path, follow=follow).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}: {remedy}") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, should be a JSON object: {remedy}"
        )
    return content
