"""The processes that make micro-batches ahead of the training step, and what becomes of them.

They hand batches on through `/dev/shm`. Where one of them dies, cannot write there, or has nothing
for a minute, the batches from there on are made in the calling process: a micro-batch is a pure
function of its identity, so the step can be finished and saved.
"""

import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import active_children
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader

from mc_ds.config import ConfigError, MCConfig
from mc_ds.data.batch import Batch, MicroStep
from mc_ds.data.loader import MicroBatchDataset

PREFETCH_PER_WORKER = 2
"""Micro-steps that each loader process may be ahead of the training step."""
POLL_S = 5.0
"""Seconds after which workers that have delivered nothing are looked at."""
PATIENCE_S = 60.0
"""Seconds that a batch may take."""
SHARED_MEMORY = Path("/dev/shm")


def prefetched_micro_steps(num_workers: int) -> int:
    """Return the micro-steps that the loader draws at most beyond the batch it last returned; a
    change of stage must wait for as many.
    """
    return PREFETCH_PER_WORKER * num_workers


def check_shared_memory(
    mc: MCConfig, *, micro_batch_size: int, num_workers: int, processes: int
) -> None:
    """Raise ConfigError where `/dev/shm` has no room for the batches that the loaders of this
    host's `processes` ranks hold ready.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    needed = processes * prefetched_micro_steps(num_workers) * batch_bytes(mc, micro_batch_size)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise ConfigError(
            f"data.num_workers = {num_workers}: the loaders of {processes} ranks on this host need "
            f"{needed / 1e6:.1f} MB of {SHARED_MEMORY}, which has {free / 1e6:.1f} MB free: remove "
            "what ended processes left there, give the container more (--shm-size), or use none"
        )


def batch_bytes(mc: MCConfig, micro_batch_size: int) -> int:
    """Return the bytes of a micro-batch's tensors at the W that takes most."""
    sequence = 8 * (mc.seq_len + 1) + 4 * mc.horizon_tokens + 8
    plans = max(2 * 8 * mc.rows_at(length) * length for length in mc.wc_lengths)
    return micro_batch_size * (sequence + plans)


class LoadedBatches(Iterator[Batch]):
    """Batches of `micro_steps`, in order; see `make_loader`."""

    def __init__(
        self,
        dataset: MicroBatchDataset,
        micro_steps: Iterable[MicroStep],
        *,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.failure: str | None = None
        """What happened to the loader processes; None while all is well."""
        self._dataset, self._pin_memory = dataset, pin_memory
        self._micro_steps = iter(micro_steps)
        self._loaded: Iterator[Batch] | None = None
        if not num_workers:
            return
        self._micro_steps, ahead = itertools.tee(self._micro_steps)
        loader: DataLoader[Batch] = DataLoader(
            dataset,
            sampler=ahead,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
            prefetch_factor=PREFETCH_PER_WORKER,
            # Forked, so that no server process stands between the trainer and its workers, for a
            # signal to kill.
            multiprocessing_context="fork",
            worker_init_fn=_leave_signals_to_the_trainer,
            collate_fn=_shared,
            timeout=POLL_S,
        )
        others, before = active_children(), signal.getsignal(signal.SIGCHLD)
        self._loaded = iter(loader)
        self._workers = [child for child in active_children() if child not in others]
        # Torch's handler raises wherever the trainer happens to be when a worker dies.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def __next__(self) -> Batch:
        """Return the next batch. Raises what the data itself raises."""
        micro_step = next(self._micro_steps)
        if self._loaded is not None:
            try:
                return self._take(self._loaded)
            except (RuntimeError, OSError, EOFError) as error:
                self._give_up(error)
        batch = self._dataset[micro_step]
        return batch.pin_memory() if self._pin_memory else batch

    def _take(self, loaded: Iterator[Batch]) -> Batch:
        """Return the next batch of the workers, or raise what they raise; TimeoutError after
        `PATIENCE_S`.

        It is taken in a thread, which is left behind where it waits for what never comes: memory
        of a worker that stands still, or a lock that a killed worker held.
        """
        answer: SimpleQueue[Batch | BaseException] = SimpleQueue()
        Thread(target=_answer, args=(loaded, answer), name="batch", daemon=True).start()
        try:
            taken = answer.get(timeout=PATIENCE_S + POLL_S)
        except Empty:
            raise TimeoutError(f"a worker timed out after {PATIENCE_S:g} s") from None
        if isinstance(taken, BaseException):
            raise taken
        return taken

    def _give_up(self, error: BaseException) -> None:
        """End the workers, whatever they are doing, and say why."""
        self.failure = _cause(error)
        print(
            f"warning: a data loader failed: {self.failure}: this process makes the batches itself",
            file=sys.stderr,
            flush=True,
        )
        for worker in self._workers:
            worker.kill()
        _abandoned.append(self._loaded)
        self._loaded = None


_abandoned: list[object] = []
"""Iterators of dead workers: torch would wait for their locks when one is collected."""


def _answer(loaded: Iterator[Batch], answer: "SimpleQueue[Batch | BaseException]") -> None:
    try:
        answer.put(_patiently(loaded))
    except BaseException as error:  # the trainer raises it
        answer.put(error)


def make_loader(
    dataset: MicroBatchDataset,
    micro_steps: Iterable[MicroStep],
    *,
    num_workers: int,
    pin_memory: bool,
) -> LoadedBatches:
    """Return the batches of `micro_steps`, in order. `micro_steps` may be endless; it is drawn
    lazily (see `prefetched_micro_steps`).

    Leaves the global random state alone. Loader processes run one torch thread each (the default
    of DataLoader); with `num_workers` 0 batches are made in the calling process.
    """
    return LoadedBatches(dataset, micro_steps, num_workers=num_workers, pin_memory=pin_memory)


def _shared(batch: Any) -> Any:
    """Move a batch to shared memory in the worker itself: left to the queue's own thread, a full
    /dev/shm would lose the batch and tell nobody.
    """
    return batch.share_memory()


def _patiently(loaded: Iterator[Batch]) -> Batch:
    """Return the next batch of workers that may be slow; each time-out looks whether all are
    alive.
    """
    for _ in range(round(PATIENCE_S / POLL_S) - 1):
        try:
            return next(loaded)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
    return next(loaded)


def _cause(error: BaseException) -> str:
    """The last line of an error, which comes with the traceback of the worker, and what is free."""
    said = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if not SHARED_MEMORY.is_dir():
        return said
    return f"{said} ({SHARED_MEMORY} has {shutil.disk_usage(SHARED_MEMORY).free / 1e6:.1f} MB free)"


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Launchers signal whole process trees, and a trainer that is asked to stop still needs its
    batches: only it may end its workers.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(
        target=_exit_when_the_trainer_says_so, args=(os.getppid(),), name="sigterm", daemon=True
    ).start()


def _exit_when_the_trainer_says_so(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
