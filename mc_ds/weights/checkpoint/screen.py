"""Screening: no file of a checkpoint is unpickled in full before it is known to hold data alone.

DeepSpeed opens its files with the whole of pickle, which runs whatever they ask for; hashes say
that a file is as it was written, not who wrote it. Each one is therefore first read as the
converter reads it, weights-only and with its few stand-ins for DeepSpeed's classes: what passes
names no other class or function, so that a full unpickler finds none either.
"""

from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.weights.checkpoint.lazy import load_lazy


def problem_of_pickles(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return why a file below `folder` must not be unpickled, or None.

    Looks at every `shares`-th `*.pt` from number `share` on. Reads their pickles, not the tensors.
    What cannot be screened must not be unpickled either: pipes, devices, and links to folders,
    whose files are not below this one.
    """
    found = (
        path
        for path in folder.rglob("*")
        if path.suffix == ".pt" or (path.is_symlink() and not path.is_file())
    )
    for path in sorted(found)[share::shares]:
        if not path.is_file():
            return f"{path} is not a regular file and cannot be screened"
        try:
            load_lazy(path)
        except ConfigError as error:
            return str(error)
    return None


def refusal(folder: Path, problem: str) -> ConfigError:
    """Return the error for a checkpoint that must not be opened."""
    return ConfigError(
        f"{folder} could run code: {problem}; if you made it yourself and trust every file in it,"
        " set checkpoint.trusted"
    )
