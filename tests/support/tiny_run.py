"""Training runs of a second or two for the tests: settings, a small corpus, and processes that
are never left behind.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch

from mc_ds.storage import MANIFEST, fingerprint, write_manifest
from mc_ds.weights.checkpoint.folder import list_checkpoints
from tests.support.processes import ROOT, inherited

TIMEOUT_S = 900
"""Seconds after which a program hangs, however busy the machine is."""
TIMED = ("_ms", "per_s", "_gb", "tflops", "mfu")
"""How names of metrics end that differ between two equal runs."""
ONLY_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def settings(folder: Path, name: str, stage: int = 3, **changes: Any) -> dict[str, Any]:
    """A complete recipe: T = 64, K = 4, two levels, four rows, two micro-steps on two ranks and
    four on one.
    """
    recipe: dict[str, Any] = dict(
        name=name,
        out_dir=str(folder / "runs"),
        deepspeed_config=str(_deepspeed_json(folder, stage)),
        backbone=dict(
            dim=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_dim=48, init_std=0.1
        ),  # wide: row scores that differ by more than rounding
        mc=dict(
            seq_len=64,
            block_size=4,
            max_lod=2,
            train_wc_length=40,
            recent_tokens=12,
            horizon_tokens=6,
            num_random_variants=3,
            training_lod2_probability=0.5,
            lens_dim=32,
            lens_layers=1,
            lens_heads=2,
            lens_lr=1e-3,
            lens_warmup_steps=2,
        ),
        data=dict(cache_dir=str(folder / "cache"), vocab_size=300, val_fraction=0.3, num_workers=0),
        train=dict(
            total_steps=6,
            global_batch_size=4,
            micro_batch_size=1,
            learning_rate=2e-3,
            warmup_steps=2,
            precision="fp32",
        ),
        validation=dict(eval_interval=3, eval_sequences=3, continuations=0),
        checkpoint=dict(interval=3, keep_last=2),
        telemetry=dict(wandb=False, progress=False),
    )
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    return recipe


def _deepspeed_json(folder: Path, stage: int) -> Path:
    """The shipped JSON, with even the smallest parameters sharded and changes of the order of
    calls reported.
    """
    content = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    if stage == 3:
        content["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "log_trace_cache_warnings": True,
        }
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(content))
    return path


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process on one CPU core, for which the standard library is a few small
    files: the corpus of `source: stdlib`.
    """
    library, site = folder / "library", folder / "site"
    if not site.exists():
        write_library(library)
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "import sysconfig\n_get_path = sysconfig.get_path\ndef get_path(name, *args,"
            f" **kwargs):\n    return {str(library)!r} if name == 'stdlib' else _get_path(name,"
            " *args, **kwargs)\nsysconfig.get_path = get_path\n"
        )
    return inherited(site, **ONLY_CPU)


def trainer_of(checkpoint: Path) -> dict[str, Any]:
    """What `trainer.json` of a checkpoint says, but for the run's name and how it was first
    started.
    """
    trainer: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text())
    del trainer["config"]["name"], trainer["first_start"]
    return trainer


def edit_trainer(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes `trainer.json` of a checkpoint, and its manifest."""
    path = checkpoint / "trainer.json"
    trainer = json.loads(path.read_text())
    change(trainer)
    path.write_text(json.dumps(trainer))
    files = [file for file in checkpoint.iterdir() if file.name != MANIFEST]
    write_manifest(checkpoint, {file.name: fingerprint(file) for file in files})


def write_library(folder: Path) -> None:
    """A few small files in the place of the standard library."""
    rng = random.Random(0)
    folder.mkdir()
    for module in range(24):
        lines = [
            f"{rng.choice('abcdef')}{rng.randint(0, 99)} ="
            f" {rng.choice(('alpha', 'beta'))}({rng.randint(0, 999)})"
            for _ in range(60)
        ]
        (folder / f"module_{module}.py").write_text("\n".join(lines) + "\n")


def run(
    command: Sequence[str | Path], variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs one program from the repository to its end."""
    return _run_together([command], [variables])[0]


def run_ranks(world_size: int, arguments: Sequence[str | Path], variables: dict[str, str]) -> None:
    """Runs one Python program on every rank, as a launcher would. Fails with the ranks' last
    words where one fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **meeting}
        for rank in range(world_size)
    ]
    ended = _run_together(
        [[sys.executable, *arguments]] * world_size, [variables | rank for rank in ranks]
    )
    assert not any(done.returncode for done in ended), "\n".join(
        f"exit {done.returncode}: {done.stderr[-2000:]}" for done in ended
    )


def _run_together(
    commands: Sequence[Sequence[str | Path]], variables: Sequence[dict[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    """Runs programs side by side; when one fails, or time is up, all are killed with whatever
    they started.
    """
    deadline = time.monotonic() + TIMEOUT_S
    with ExitStack() as files:
        outputs = [
            [files.enter_context(tempfile.TemporaryFile("w+")) for _ in "oe"] for _ in commands
        ]
        started = [
            subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=out, stderr=err, start_new_session=True
            )
            for command, environ, (out, err) in zip(commands, variables, outputs, strict=True)
        ]
        try:
            while (
                any(process.poll() is None for process in started) and time.monotonic() < deadline
            ):
                if any(process.poll() for process in started):
                    break
                time.sleep(0.02)
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(
                        process.pid, signal.SIGKILL
                    )  # each process leads a session of its own
        return [
            _completed(process, *texts) for process, texts in zip(started, outputs, strict=True)
        ]


def _completed(
    process: "subprocess.Popen[bytes]", out: TextIO, err: TextIO
) -> subprocess.CompletedProcess[str]:
    out.seek(0)
    err.seek(0)
    return subprocess.CompletedProcess(process.args, process.wait(), out.read(), err.read())


class Runs:
    """Runs of tests/support/training_worker.py in one folder, and what they left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.environment = folder, environment(folder)

    def scenario(
        self,
        label: str,
        name: str | None = None,
        stage: int = 3,
        nan: list[int] | None = None,
        stop_after: int | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """A run for `work`; `nan` and `stop_after` are the worker's, `name` (default: the label)
        the run's.
        """
        config = settings(self.folder, name or label, stage, **changes)
        return {"label": label, "config": config, "nan": nan, "stop_after": stop_after}

    def work(self, world_size: int, scenarios: list[dict[str, Any]]) -> None:
        """Runs the scenarios one after the other on `world_size` ranks."""
        path = self.folder / f"scenarios_{world_size}.json"
        path.write_text(json.dumps(scenarios))
        run_ranks(
            world_size,
            [ROOT / "tests" / "support" / "training_worker.py", path, self.folder],
            self.environment,
        )

    def snapshots(self, label: str, rank: int = 0) -> list[dict[str, Any]]:
        """What the run held before its first and after every step."""
        snapshots: list[dict[str, Any]] = torch.load(
            self.folder / f"{label}-{rank}.pt", weights_only=True
        )
        return snapshots

    def records(self, name: str) -> list[dict[str, Any]]:
        """`metrics.jsonl` of a run."""
        return [
            json.loads(line)
            for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        ]

    def checkpoints(self, name: str) -> list[str]:
        """Names of a run's complete checkpoints, newest first."""
        return [path.name for path in list_checkpoints(self.folder / "runs" / name / "checkpoints")]
