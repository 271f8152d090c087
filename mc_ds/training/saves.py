"""Saves a run's checkpoints, reports them, and measures for how long training stands still."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mc_ds.training.checkpoint import CheckpointSaver, checkpoint_step
from mc_ds.training.guards.exit_codes import RunStopped
from mc_ds.training.ranks.agreement import agree
from mc_ds.training.report import Reporter


class Saves:
    """The checkpoints of one run, as its loop saves them. All methods but `metrics` are
    collectives.
    """

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
        called with the phase "checkpoint" before a save. With `background`, periodic checkpoints
        are written while training goes on.
        """
        self._saver, self._state, self._reporter, self._mark = saver, state, reporter, mark
        self._background = background
        self._unreported_s = 0.0
        self._current_s = 0.0

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing in the background."""
        return self._saver.writing

    def save(self) -> Path:
        """Save a checkpoint in the foreground and return it."""
        self._begin(background=False)
        checkpoint = self.publish()
        assert checkpoint is not None, "it was begun"
        return checkpoint

    def save_periodically(self) -> None:
        """Save a checkpoint, in the background if the run wants that."""
        if self._background:
            self._begin(background=True)
        else:
            self.save()

    def publish(self) -> Path | None:
        """Publish the pending checkpoint, if there is one, as soon as it is written; return it."""
        if not self._saver.pending:
            return None
        with self._standing_still():
            checkpoint = self._saver.finish()
        seconds, self._current_s = self._current_s, 0.0
        self._reporter.saved(
            checkpoint_step(checkpoint),
            f"{checkpoint} is complete; training stood still for {seconds:.2f} s",
        )
        return checkpoint

    def publish_at_the_end(self) -> None:
        """Publish the pending checkpoint of a run that stops for another reason, which remains the
        one to report.
        """
        try:
            self.publish()
        except RunStopped as failed:
            self._reporter.log([str(failed)])

    def metrics(self) -> dict[str, float]:
        """Return for how long training stood still since the last call, if it did."""
        seconds, self._unreported_s = self._unreported_s, 0.0
        return {"train/checkpoint_stall_ms": 1e3 * seconds} if seconds else {}

    def _begin(self, *, background: bool) -> None:
        """Begin a checkpoint, after the pending one and once the record is on disk: a checkpoint
        must not be newer than the record.
        """
        self.publish()
        with self._standing_still():
            self._reporter.flush()
            agree(self._reporter.error)
            crowded = self._saver.begin(**self._state(), background=background)
        self._reporter.text(crowded)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Measure the time that training stands still for a checkpoint."""
        self._mark("checkpoint")
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._current_s += seconds
        self._unreported_s += seconds
