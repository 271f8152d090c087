"""Runs trials in parallel, each a training followed by its evaluations, and stores results in
files.

`jobs` trials run at a time, each on one GPU if there are any. Finished trials are not run again;
one that fails or takes too long leaves its log, and the next call tries it again.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue

import deepspeed
import torch

import mc_ds
from ablation.commands import Stop, last_line, run_command
from ablation.trials import Trial
from mc_ds.config import ConfigError
from mc_ds.config.recipe import to_yaml
from mc_ds.data import open_data
from mc_ds.storage import replace_text

THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
"""Environment variables that limit each process to its share of the cores, unless already set."""


@dataclass(frozen=True)
class Runner:
    """Runs trials, `jobs` at a time."""

    launch: Path
    """Folder with train.py and evaluate.py."""
    made: str
    """Line about this call and its hardware, stored with all results."""
    jobs: int
    gpus: Sequence[str]
    """GPUs assigned to jobs in turn; empty: processes choose their device."""
    timeout_s: float
    """Time limit of each command."""
    stop: Stop
    remove_checkpoints: bool = False
    """Whether to remove the checkpoints of finished trials."""
    report: Callable[[str], None] = print

    def run(self, trials: Iterable[Trial]) -> None:
        """Run the missing trials, longest first; return when all have ended, or on `stop`."""
        slots: SimpleQueue[str | None] = SimpleQueue()
        for job in range(self.jobs):
            slots.put(self.gpus[job % len(self.gpus)] if self.gpus else None)
        longest = sorted(trials, key=lambda trial: -trial.config.train.total_steps)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda trial: self._run(trial, slots), longest))

    def _run(self, trial: Trial, slots: "SimpleQueue[str | None]") -> None:
        gpu = slots.get()
        try:
            if not self.stop and trial.missing and self._train(trial, gpu):
                for records in trial.missing:
                    self._evaluate(trial, records, gpu)
            if self.remove_checkpoints and not trial.missing:
                shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)
        finally:
            slots.put(gpu)

    def _train(self, trial: Trial, gpu: str | None) -> bool:
        """Train, unless the trained checkpoint exists; return whether it exists now."""
        if trial.trained.exists() and (trial.folder / "checkpoints").exists():
            return True
        shutil.rmtree(trial.folder, ignore_errors=True)  # remains of an interrupted call
        recipe = trial.folder.with_name(f"{trial.folder.name}.yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        replace_text(recipe, to_yaml(trial.config))
        started = time.monotonic()
        command = [str(self.launch / "train.py"), "--config", str(recipe)]
        if not self._command(command, log_of(trial.folder), gpu):
            return False
        content = {"seconds": time.monotonic() - started, "made": self.made}
        replace_text(trial.trained, json.dumps(content))
        return True

    def _evaluate(self, trial: Trial, records: Path, gpu: str | None) -> None:
        out = records.with_suffix(".partial")
        options = ["--checkpoint", str(trial.folder), *trial.evaluations[records]]
        command = [str(self.launch / "evaluate.py"), *options, "--out", str(out)]
        if self._command(command, log_of(records), gpu):
            content = {"made": self.made, "records": json.loads(out.read_text(encoding="utf-8"))}
            replace_text(records, json.dumps(content))
            out.unlink()

    def _command(self, command: Sequence[str], log: Path, gpu: str | None) -> bool:
        if self.stop:
            return False
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        environ = dict.fromkeys(THREADS, threads) | dict(os.environ)
        if gpu is not None:
            environ["CUDA_VISIBLE_DEVICES"] = gpu
        self.report(f"started  {log.stem}")
        finished = run_command(
            [sys.executable, *command],
            log=log,
            environ=environ,
            timeout_s=self.timeout_s,
            stop=self.stop,
        )
        self.report(f"finished {log.stem}" if finished else f"failed   {log}: {last_line(log)}")
        return finished


def log_of(result: Path) -> Path:
    """Return the log file for a result: a training's folder, or an evaluation's records."""
    return result.with_name(f"{result.name}.log")


def prepare_data(trials: Iterable[Trial]) -> None:
    """Prepare the data of all trials first, because parallel trainings would wait for each other.

    Raises ConfigError for unusable data.
    """
    configs = {trial.config.data.model_dump_json(): trial.config.data for trial in trials}
    for config in configs.values():
        try:
            open_data(config)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the data cannot be used: {error}") from error


def provenance(command: str, jobs: int) -> str:
    """Return a line with command, hardware, versions, commit and date, without host names."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = [*(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)), cores]
    return (
        f"`{command}`: {', '.join(hardware)}; Python {platform.python_version()}, torch"
        f" {torch.__version__}, DeepSpeed {deepspeed.__version__}, mc_ds {mc_ds.__version__};"
        f" commit: {_git_commit()}; {datetime.now(UTC).date().isoformat()}; {jobs} at a time."
    )


def _git_commit() -> str:
    """Return the short commit of this code, followed by "with changes" if files were changed;
    "unknown" outside of a clone.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    try:
        described = subprocess.run(
            [*command, "--dirty= with changes"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def visible_gpus() -> list[str]:
    """Return the GPUs visible to this process, as names for CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]
