"""Saving: every rank writes to a staging folder. When all have succeeded, rank 0 publishes it, and
only then removes older checkpoints.

DeepSpeed's own save writes shards to their final path, and `latest` before its last barrier; if one
rank cannot write, the others hang. Here its writes go through a checkpoint engine that records
errors instead of raising them, so that all ranks reach the end.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from mc_ds.storage import (
    FileFacts,
    StagedFolder,
    fingerprint,
    reason,
    sync_file,
    write_manifest,
    write_tensors,
    write_text,
)
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.ranks.agreement import agree, agreed, broadcast, gather, is_main, on_main
from mc_ds.weights.checkpoint.folder import checkpoint_name, publish, remove_surplus
from mc_ds.weights.checkpoint.shards import LENS
from mc_ds.weights.checkpoint.trainer import TRAINER

SAVING = "cannot save the checkpoint (older ones are intact)"
"""Start of every message about a checkpoint that could not be written."""


def save_checkpoint(
    folder: Path,
    engine: Any,
    *,
    step: int,
    lens_state: dict[str, Any] | None,
    trainer_state: dict[str, Any],
    keep_last: int,
    keep_every: int = 0,
    watchdog: Watchdog,
) -> Path:
    """Save a checkpoint and return its path. A collective.

    `trainer_state` goes to `trainer.json`. `watchdog` times each file that this rank writes or
    hashes, but not its waiting for other ranks. If any rank cannot write, raises RunStopped on all
    ranks; the staging folder is then removed, and older checkpoints are unchanged.
    """
    final = folder / checkpoint_name(step)
    staged = agreed(lambda: StagedFolder(final, lock=False) if is_main() else None, doing=SAVING)
    path = broadcast(None if staged is None else staged.path)
    assert path is not None
    writer = _RecordingEngine(watchdog)
    with staged or nullcontext():
        _save_engine(engine, path, writer)
        if staged is not None:
            if lens_state is not None:
                writer.write(path / LENS, lambda path: write_tensors(path, lens_state))
            content = json.dumps({"step": step, **trainer_state}, indent=1) + "\n"
            writer.write(path / TRAINER, lambda path: write_text(path, content))
        agree(writer.error)
        files = {name: facts for ranks in gather(writer.files) for name, facts in ranks.items()}
        on_main(lambda: _complete(staged, files, watchdog), doing=SAVING)

    def remove_older() -> None:
        watchdog.mark("checkpoint: removal of older ones")
        remove_surplus(final, keep_last=keep_last, keep_every=keep_every)

    on_main(remove_older, doing=SAVING)
    watchdog.mark("checkpoint complete")
    return final


class _RecordingEngine(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed ships no types
    """A checkpoint engine that syncs DeepSpeed's files to disk and records their sizes and hashes.

    It stores the first error in `error` instead of raising it.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self.name, self.watchdog = "mc_ds", watchdog
        self.files: dict[str, FileFacts] = {}
        self.error: RunStopped | None = None

    def write(self, path: Path, write: Callable[[Path], FileFacts]) -> None:
        """Write one file, unless an earlier one has failed."""
        if self.error is None:
            self.watchdog.mark(f"checkpoint: {path.name}")
            try:
                self.files[path.name] = write(path)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                cause = error.strerror if isinstance(error, OSError) else None
                line = f"{SAVING}: {path}: {cause or reason(error)}"
                self.error = RunStopped(line, ExitCode.STORAGE)
            self.watchdog.rest("checkpoint: files of other ranks")

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file for DeepSpeed."""
        self.write(Path(path), lambda path: write_tensors(path, state_dict))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: rank 0 has made the folder."""

    def create(self, info: Any) -> None:
        """Do nothing."""

    def commit(self, info: Any) -> bool:
        """Do nothing: the checkpoint is committed by renaming its folder."""
        return True


def _save_engine(engine: Any, folder: Path, writer: _RecordingEngine) -> None:
    """Call DeepSpeed's save with `writer` as its checkpoint engine.

    Recovery scripts are not copied into the folder: the installed package has them, and errors of
    copying would not be recorded.
    """
    before = engine.checkpoint_engine
    engine.checkpoint_engine, engine._copy_recovery_script = writer, lambda save_path: None
    try:
        engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state={"torch_rng": torch.get_rng_state()},
            save_latest=False,
        )
    finally:
        engine.checkpoint_engine = before


def _complete(staged: StagedFolder | None, files: dict[str, FileFacts], watchdog: Watchdog) -> None:
    assert staged is not None, "this runs on rank 0"
    # Add files that were not written through `writer`, such as copies of an NVMe offload.
    for path in staged.path.rglob("*"):
        name = path.relative_to(staged.path).as_posix()
        if name not in files and path.is_file():
            watchdog.mark(f"checkpoint: hash of {name}")
            sync_file(path)
            files[name] = fingerprint(path)
    watchdog.mark("checkpoint: manifest")
    write_manifest(staged.path, files)
    publish(staged)
