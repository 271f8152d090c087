"""Saves a run's checkpoints, reports them, and measures how long they pause training."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mc_ds.training.checkpoint import CheckpointSaver, checkpoint_step
from mc_ds.training.guards.exit_codes import RunStopped
from mc_ds.training.ranks.agreement import agree, gather
from mc_ds.training.report import Reporter


class Saves:
    """Saves the checkpoints of one run. All methods but `metrics` are collectives."""

    def __init__(
        self,
        saver: CheckpointSaver,
        state: Callable[[], dict[str, Any]],
        reporter: Reporter,
        mark: Callable[[str], None],
        *,
        background: bool,
    ) -> None:
        """`state` returns the arguments of `CheckpointSaver.begin` for the current step. `mark` is
        called with the phase "checkpoint" before a save. `background`: write periodic checkpoints
        in the background.
        """
        self._saver, self._state, self._reporter, self._mark = saver, state, reporter, mark
        self._background = background
        self._unreported_s = 0.0
        self._current_s = 0.0

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing in the background. Not a collective."""
        return self._saver.writing

    def save(self) -> Path:
        """Save a checkpoint in the foreground and return it."""
        self._begin(background=False)
        checkpoint = self.publish()
        assert checkpoint is not None, "a checkpoint was begun"
        return checkpoint

    def save_periodically(self) -> None:
        """Save a checkpoint, in the background if the config says so."""
        if self._background:
            self._begin(background=True)
        else:
            self.save()

    def publish(self) -> Path | None:
        """Wait until the pending checkpoint is written, publish and return it; None without one."""
        if not self._saver.pending:
            return None
        with self._pause():
            checkpoint = self._saver.finish()
        seconds, self._current_s = self._current_s, 0.0
        self._reporter.saved(
            checkpoint_step(checkpoint),
            f"{checkpoint} is complete; training paused for {seconds:.2f} s",
        )
        return checkpoint

    @contextmanager
    def published_at_the_end(self) -> Iterator[None]:
        """If the block ends the run on all ranks, publish the pending checkpoint, and wait for the
        removal of older ones. If that fails too, only log it.
        """
        try:
            yield
        except RunStopped as stopped:
            if stopped.on_all_ranks:
                try:
                    self.publish()
                    self._saver.finish_removal()
                except RunStopped as failed:
                    self._reporter.log([str(failed)])
            raise

    def metrics(self) -> dict[str, float]:
        """Return how long checkpoints paused training since the last call; empty if they
        did not.
        """
        seconds, self._unreported_s = self._unreported_s, 0.0
        return {"train/checkpoint_stall_ms": 1e3 * seconds} if seconds else {}

    def _begin(self, *, background: bool) -> None:
        """Publish the pending checkpoint and begin another.

        Metrics are flushed to disk first, so that no checkpoint is newer than `metrics.jsonl`.
        """
        self.publish()
        with self._pause():
            self._reporter.flush()
            agree(self._reporter.error)
            lines = self._saver.begin(**self._state(), background=background)
            by_rank = gather(lines) if background else []
        affected = [(rank, lines) for rank, lines in enumerate(by_rank) if lines]
        for rank, lines in affected[:1]:
            self._reporter.text([f"rank {rank}: {line}" for line in lines])
        if len(affected) > 1:
            self._reporter.text([f"  likewise on {len(affected) - 1} other ranks"])

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Measure the block's time, during which training pauses for a checkpoint."""
        self._mark("checkpoint")
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._current_s += seconds
        self._unreported_s += seconds
