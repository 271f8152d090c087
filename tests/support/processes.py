"""What processes that tests start are given: an environment in which they find this repository and
what the tests themselves found, and the launchers of this interpreter.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = "PYTHONPATH"
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
LAUNCHERS = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}
"""Modules whose `main` the launchers' scripts call."""


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders and this repository before what is there: environment modules
    make packages known by it.
    """
    first = [*map(str, folders), str(ROOT)]
    before = os.environ.get(PATH, "").split(os.pathsep)
    return os.pathsep.join([*first, *(entry for entry in before if entry not in ("", *first))])


def share_python_path() -> None:
    """Let whatever this process starts find the repository, installed or not, from any folder."""
    os.environ[PATH] = python_path()


def inherited(*folders: Path, **changes: str) -> dict[str, str]:
    """The environment of a program that is no rank: this process's, but for what a launcher or
    Slurm has set, with these folders first on PYTHONPATH, one thread, and these changes.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith("SLURM_")
    }
    # On a busy machine two threads of a rank wait for each other at every small operation.
    return {**kept, "OMP_NUM_THREADS": "1", PATH: python_path(*folders), **changes}


def bare(variables: Mapping[str, str]) -> dict[str, str]:
    """An environment of these variables alone, and of what Python needs to find packages."""
    return {PATH: python_path(), **variables}


def launcher(name: str) -> list[str]:
    """The command of a launcher: this interpreter's script, or what the script would run where
    packages lie in a folder without scripts. (One found on PATH may belong to another Python.)
    """
    script = Path(sys.executable).with_name(name)
    return [str(script)] if script.exists() else [sys.executable, "-m", LAUNCHERS[name]]
