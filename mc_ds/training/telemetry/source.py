"""Which source a run executes."""

import subprocess
from pathlib import Path

import mc_ds

TIMEOUT_S = 10.0


def source_commit() -> str | None:
    """Return the commit of this package's source, with `-dirty` where files differ from it; None
    where it is not in a git repository of its own, or git is missing.
    """
    init = Path(mc_ds.__file__)
    root = init.parents[1]
    if _git(root, "ls-files", "--error-unmatch", str(init.relative_to(root))) is None:
        return None
    return _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git prints; None where it fails."""
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
