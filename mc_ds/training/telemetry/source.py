"""The git commit of the code in use."""

import subprocess
from pathlib import Path

import mc_ds

TIMEOUT_S = 10.0


def source_commit() -> str | None:
    """Return the git commit of this package's source, with `-dirty` if files were changed.

    None if the package is not in a git repository of its own, or if git is not installed.
    """
    init = Path(mc_ds.__file__)
    root = init.parents[1]
    if _git(root, "ls-files", "--error-unmatch", str(init.relative_to(root))) is None:
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(root: Path, *arguments: str) -> str | None:
    """Run git and return its output; None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
