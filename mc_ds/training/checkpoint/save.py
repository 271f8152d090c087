"""Saving: every rank writes to a staging folder. When all have succeeded, rank 0 publishes it, and
only then removes older checkpoints.

A save in the foreground pauses training until it is published. A save in the background pauses it
only while the state is copied to host memory; a thread of each rank then writes the copies, and the
checkpoint is published at the first step boundary at which all ranks have written.

DeepSpeed's own save writes shards to their final path, and `latest` before its last barrier; if one
rank cannot write, the others hang. Here its writes go through a checkpoint engine that records
errors instead of raising them, so that all ranks reach the end.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
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
from mc_ds.training.checkpoint.host_memory import available_memory
from mc_ds.training.checkpoint.snapshot import host_bytes, host_copy
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.ranks.agreement import agree, agreed, broadcast, gather, is_main, on_main
from mc_ds.weights.checkpoint.folder import checkpoint_name, publish, remove_surplus
from mc_ds.weights.checkpoint.shards import LENS
from mc_ds.weights.checkpoint.trainer import TRAINER

SAVING = "cannot save the checkpoint (older ones are intact)"
"""Start of every message about a checkpoint that could not be written."""
THREAD = "checkpoint"
"""Name of the threads that write and remove checkpoints."""
OTHERS = "checkpoint: files of other ranks"
"""Phase in which a rank has written its files and waits for others."""
MEMORY_SHARE = 0.8
"""Share of the host's available memory that copies of a state may take."""


class CheckpointSaver:
    """Saves the checkpoints of one run, one at a time. All methods are collectives.

    If any rank cannot write, they raise RunStopped on all ranks; the staging folder is then
    removed, and older checkpoints are unchanged.
    """

    def __init__(
        self,
        folder: Path,
        engine: Any,
        *,
        keep_last: int,
        keep_every: int = 0,
        watchdog: Watchdog,
        ranks_per_host: int = 1,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """`watchdog` times each file that this rank writes or hashes, but not its waiting for other
        ranks. `check_owner` raises on all ranks if another run has taken the folder.
        """
        self.folder, self.engine, self.watchdog = folder, engine, watchdog
        self.keep_last, self.keep_every = keep_last, keep_every
        self._ranks_per_host, self._check_owner = ranks_per_host, check_owner
        self._pinned = 0
        self._save: _Save | None = None
        self._removal: _Task | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun but not published; equal on all ranks."""
        return self._save is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing in the background. Not a collective."""
        return self._save is not None and self._save.task is not None and self._save.task.is_running

    def begin(
        self,
        *,
        step: int,
        lens_state: dict[str, Any] | None,
        trainer_state: dict[str, Any],
        background: bool,
    ) -> list[str]:
        """Write a checkpoint that `finish` will publish; `trainer_state` goes to `trainer.json`.

        In the background the state is copied to host memory and written from there. If a file
        cannot be copied, because memory is short, it is written at once. Returns a line for each
        such file of this rank.
        """
        assert self._save is None, "finish the checkpoint before"
        self.finish_removal()
        self._check_owner()
        final = self.folder / checkpoint_name(step)
        with ExitStack() as undo:
            staged = agreed(
                lambda: undo.enter_context(StagedFolder(final, lock=False)) if is_main() else None,
                doing=SAVING,
            )
            path = broadcast(None if staged is None else staged.path)
            assert path is not None
            self.watchdog.mark("checkpoint")
            writer = _RecordingEngine(
                self.watchdog, self._memory_for_copies() if background else None
            )
            _save_engine(self.engine, path, writer)
            if staged is not None:
                if lens_state is not None:
                    writer.save(lens_state, path / LENS)
                content = json.dumps({"step": step, **trainer_state}, indent=1) + "\n"
                writer.write(path / TRAINER, lambda path: write_text(path, content))
            self._pinned = max(self._pinned, writer.pinned)
            task = _Task(writer.write_postponed) if background else None
            self._save = _Save(final, staged, writer, task, undo.pop_all())
        if background:
            self.watchdog.mark("checkpoint copied")
        return writer.not_copied

    def _memory_for_copies(self) -> int:
        """Return how many bytes of host memory this rank may use for copies."""
        return int(MEMORY_SHARE * available_memory() / self._ranks_per_host) + self._pinned

    def finish(self) -> Path:
        """Wait until the pending checkpoint is written, publish it and return its path."""
        assert self._save is not None, "begin a checkpoint first"
        save, self._save = self._save, None
        with save.undo:
            if save.task is not None:
                save.task.wait(self.watchdog, lambda: save.writer.phase)
                self.watchdog.rest(OTHERS)
            # Errors are raised only now, when no rank writes any more: they remove the folder.
            by_rank = gather(save.writer.files)
            if save.task is not None:
                if is_main():
                    self.watchdog.mark("checkpoint: all files are written")
                self._check_owner()
                agree(save.task.error)
            agree(save.writer.error)
            files = {name: facts for ranks in by_rank for name, facts in ranks.items()}
            on_main(lambda: _complete(save.staged, files, self.watchdog), doing=SAVING)
        if save.task is None:
            self.watchdog.mark("checkpoint: removal of older ones")
            on_main(lambda: self._remove_older(save.final), doing=SAVING)
        elif is_main():
            self._removal = _Task(lambda: self._remove_older(save.final))
        self.watchdog.mark("checkpoint complete")
        return save.final

    def _remove_older(self, newest: Path) -> None:
        remove_surplus(newest, keep_last=self.keep_last, keep_every=self.keep_every)

    def finish_removal(self) -> None:
        """Wait until older checkpoints are removed."""
        if not is_main():
            self.watchdog.rest("checkpoint: removal of older ones by rank 0")
        on_main(self._finish_removal, doing=SAVING)

    def _finish_removal(self) -> None:
        if self._removal is not None:
            removal, self._removal = self._removal, None
            removal.wait(self.watchdog, lambda: "checkpoint: removal of older ones")
            if removal.error is not None:
                raise removal.error


class _Task:
    """Runs `action` in a daemon thread and stores its error."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._action = action
        self._thread = Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the action has not ended."""
        return self._thread.is_alive()

    def wait(self, watchdog: Watchdog, phase: Callable[[], str]) -> None:
        """Wait for the end of the action. Whenever `phase()` changes, mark it in the watchdog."""
        marked = None
        while self.is_running:
            if (now := phase()) != marked:
                watchdog.mark(marked := now)
            self._thread.join(timeout=0.1)

    def _run(self) -> None:
        try:
            self._action()
        except Exception as error:  # raised by the code that waits for the task
            self.error = error


class _RecordingEngine(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed ships no types
    """A checkpoint engine that syncs DeepSpeed's files to disk and records their sizes and hashes.

    It stores the first error in `error` instead of raising it. If `memory` is not None, files are
    copied to host memory, up to `memory` bytes in total, and written by `write_postponed`; files
    that cannot be copied are written at once.
    """

    def __init__(self, watchdog: Watchdog, memory: int | None) -> None:
        self.name, self.watchdog, self.memory = "mc_ds", watchdog, memory
        self.files: dict[str, FileFacts] = {}
        self.error: RunStopped | None = None
        self.phase = "checkpoint"
        self.pinned = 0
        """Bytes of pinned memory that the copies took."""
        self.not_copied: list[str] = []
        """Messages about files that were not copied but written at once."""
        self._postponed: list[tuple[Path, Callable[[Path], FileFacts]]] = []

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Write a file of tensors. DeepSpeed calls this too."""
        path = Path(path)
        if self.memory is not None:
            problem = self._postpone(state_dict, path, self.memory)
            if problem is None:
                return
            self.not_copied.append(
                f"checkpoint.background: {problem}: training pauses while it is written"
            )
        self._write_now(path, lambda path: write_tensors(path, state_dict))

    def _postpone(self, state_dict: Any, path: Path, memory: int) -> str | None:
        """Copy a state and postpone its file. Return why not, if it cannot be copied."""
        needed = host_bytes(state_dict)
        if sum(needed) > memory:
            return (
                f"a copy of {path.name} needs {sum(needed) / 1e9:.1f} GB of host memory, but this"
                f" rank has {memory / 1e9:.1f} GB left"
            )
        self.watchdog.mark(f"checkpoint: copy of {path.name}")
        try:
            copied = host_copy(state_dict)
        except (MemoryError, RuntimeError) as error:  # such as a limit on pinned memory
            return f"{path.name} cannot be copied to host memory ({reason(error)})"
        self.memory = memory - sum(needed)
        self.pinned += needed.pinned
        self.write(path, lambda path: write_tensors(path, copied))
        self.watchdog.rest(OTHERS)
        return None

    def write(self, path: Path, write: Callable[[Path], FileFacts]) -> None:
        """Write a file with `write`, which holds a copy of the content."""
        if self.memory is None:
            self._write_now(path, write)
        else:
            self._postponed.append((path, write))

    def write_postponed(self) -> None:
        """Write the postponed files, and release the memory of their copies."""
        while self._postponed:
            self._write(*self._postponed.pop(0))

    def _write_now(self, path: Path, write: Callable[[Path], FileFacts]) -> None:
        if self.error is None:
            self.watchdog.mark(f"checkpoint: {path.name}")
            self._write(path, write)
            self.watchdog.rest(OTHERS)

    def _write(self, path: Path, write: Callable[[Path], FileFacts]) -> None:
        """Write one file, unless an earlier one has failed."""
        if self.error is not None:
            return
        self.phase = f"checkpoint: {path.name}"
        try:
            self.files[path.name] = write(path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            said = error.strerror if isinstance(error, OSError) else None
            line = f"{SAVING}: {path}: {said or reason(error)}"
            self.error = RunStopped(line, ExitCode.STORAGE)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: rank 0 has made the folder."""

    def create(self, info: Any) -> None:
        """Do nothing."""

    def commit(self, info: Any) -> bool:
        """Do nothing: the checkpoint is committed by renaming its folder."""
        return True


@dataclass(frozen=True)
class _Save:
    """A checkpoint that was begun but not published."""

    final: Path
    staged: StagedFolder | None
    """On rank 0 only."""
    writer: _RecordingEngine
    task: _Task | None
    """The thread that writes; None in the foreground."""
    undo: ExitStack
    """Removes the staging folder unless it was published."""


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
