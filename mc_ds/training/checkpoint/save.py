"""Saving: every rank writes aside, all agree that it went well, rank 0 writes the manifest, renames, and only then removes older ones.

DeepSpeed itself writes shards to their final place, `latest` before its last barrier, and leaves the other ranks waiting where one rank
cannot write. Here its writes go through a checkpoint engine that notes errors instead of raising them, so that all ranks reach the end.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from mc_ds.storage import FileProof, prove, reason, sync_folder, write_tensors, write_text
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.ranks.agreement import agree, gather, rank_and_world
from mc_ds.weights.checkpoint.folder import ASIDE, checkpoint_name, publish, remove_surplus
from mc_ds.weights.checkpoint.manifest import write_manifest
from mc_ds.weights.checkpoint.shards import LENS
from mc_ds.weights.checkpoint.trainer import TRAINER


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
    """Saves on all ranks together and returns the finished checkpoint; `trainer_state` goes to `trainer.json`.

    `watchdog` times each file that this rank writes or hashes, and not its waiting for other ranks. Raises RunStopped on all ranks where any of them cannot write; what was written is removed and older checkpoints are as before.
    """
    final = folder / checkpoint_name(step)
    aside = folder / f"{final.name}{ASIDE}"
    is_main = rank_and_world()[0] == 0
    writer = _NotingEngine(watchdog)
    try:
        _on_main(lambda: _make_empty(aside), watchdog)
        _save_engine(engine, aside, writer)
        if is_main:
            if lens_state is not None:
                writer.note(aside / LENS, lambda path: write_tensors(path, lens_state))
            content = json.dumps({"step": step, **trainer_state}, indent=1) + "\n"
            writer.note(aside / TRAINER, lambda path: write_text(path, content))
        agree(writer.error)
        proofs = {name: proof for ranks in gather(writer.proofs) for name, proof in ranks.items()}
        _on_main(lambda: _complete(aside, final, proofs, watchdog), watchdog)
    except RunStopped:
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    _on_main(lambda: remove_surplus(final, keep_last=keep_last, keep_every=keep_every), watchdog)
    watchdog.mark("checkpoint complete")
    return final


class _NotingEngine(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed ships no types
    """Writes DeepSpeed's files through to disk, keeps their proofs and the first error, and never raises."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.name, self.watchdog = "mc_ds", watchdog
        self.proofs: dict[str, FileProof] = {}
        self.error: RunStopped | None = None

    def note(self, path: Path, write: Callable[[Path], FileProof]) -> None:
        """Writes one file, unless an earlier one has failed already."""
        if self.error is None:
            self.watchdog.mark(f"checkpoint: {path.name}")
            try:
                self.proofs[path.name] = write(path)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                self.error = _cannot_write(path, error)
            self.watchdog.rest("checkpoint: files of other ranks")

    def save(self, state_dict: Any, path: str) -> None:
        """DeepSpeed's writes."""
        self.note(Path(path), lambda path: write_tensors(path, state_dict))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to do: rank 0 has made the folder."""

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def commit(self, info: Any) -> bool:
        """Nothing to do: the rename commits."""
        return True


def _save_engine(engine: Any, aside: Path, writer: _NotingEngine) -> None:
    """DeepSpeed's own save with `writer` in the place of its checkpoint engine.

    Its copies of recovery scripts into the folder are left out: they are in the installed package, and their failure would not be noted.
    """
    before = engine.checkpoint_engine
    engine.checkpoint_engine, engine._copy_recovery_script = writer, lambda save_path: None
    try:
        engine.save_checkpoint(
            str(aside.parent),
            tag=aside.name,
            client_state={"torch_rng": torch.get_rng_state()},
            save_latest=False,
        )
    finally:
        engine.checkpoint_engine = before


def _make_empty(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _complete(aside: Path, final: Path, proofs: dict[str, FileProof], watchdog: Watchdog) -> None:
    others = {
        path.relative_to(aside).as_posix(): path for path in aside.rglob("*") if path.is_file()
    }  # copies of an NVMe offload
    for name, path in others.items():
        if name not in proofs:
            watchdog.mark(f"checkpoint: hash of {name}")
            proofs[name] = prove(path)
    write_manifest(aside, proofs)
    sync_folder(aside)
    publish(aside, final)


def _on_main(action: Callable[[], None], watchdog: Watchdog) -> None:
    """Runs `action` on rank 0; its failure is everybody's."""
    error = None
    if rank_and_world()[0] == 0:
        watchdog.mark("checkpoint: folder")
        try:
            action()
        except OSError as problem:
            error = _cannot_write(Path(problem.filename or "the checkpoint"), problem)
    watchdog.rest("checkpoint: rank 0")
    agree(error)


def _cannot_write(path: Path, error: BaseException) -> RunStopped:
    what = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
    return RunStopped(
        f"cannot save the checkpoint: {path}: {what}; older checkpoints are whole", ExitCode.STORAGE
    )
