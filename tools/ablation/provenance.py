"""What a call ran on: hardware, versions, commit. No names of machines."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import deepspeed
import torch

import mc_ds
from ablation.results import Provenance


def provenance(command: str, jobs: int, commit: str | None = None) -> Provenance:
    """Of this machine, now. `commit` where git cannot tell."""
    software = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "DeepSpeed": deepspeed.__version__,
        "mc_ds": mc_ds.__version__,
    }
    return Provenance(
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        hardware=hardware(),
        versions=", ".join(f"{name} {version}" for name, version in software.items()),
        commit=commit or git_commit(),
        jobs=jobs,
    )


def hardware() -> str:
    """GPUs by model, or the number of CPU cores."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    if not torch.cuda.is_available():
        return cores
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([*(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)), cores])


def git_commit() -> str:
    """The short commit of this code, "with changes" where files differ from it; "unknown" outside of a clone."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name][: torch.cuda.device_count()]
    return [str(index) for index in range(torch.cuda.device_count())]
