"""Screening: before DeepSpeed unpickles a checkpoint, check that its files hold nothing but data.

DeepSpeed opens its files with unrestricted pickle, which can run code; hashes tell that a file is
unchanged, not who wrote it. So each file is first loaded weights-only, with replacements for the
few classes of DeepSpeed that it may contain (`lazy.load_lazy`). A file that passes refers to no
other class or function, so a full unpickler finds none either.
"""

from pathlib import Path

from mc_ds.config import ConfigError
from mc_ds.weights.checkpoint.lazy import load_lazy


def problem_of_pickles(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return why a file below `folder` must not be unpickled, or None.

    Checks every `shares`-th `*.pt` file, starting at number `share`. Reads their pickles, not the
    tensors. Pipes, devices and links to folders cannot be checked, so they must not be unpickled
    either.
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
    """Return the error for a checkpoint that must not be opened because of `problem`."""
    return ConfigError(
        f"{folder} could run code: {problem}; if you made it yourself and trust every file in it,"
        " set checkpoint.trusted"
    )
