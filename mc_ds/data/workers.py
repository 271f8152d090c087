"""Loader processes, which make micro-batches ahead of the training step.

They pass batches through `/dev/shm`. If one dies, cannot write there, or delivers nothing for a
minute, the calling process makes all further batches itself and the run goes on: a micro-batch
depends only on its `MicroStep`.
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
"""Micro-steps that each loader process prefetches."""
POLL_S = 5.0
"""Seconds between checks that workers are alive, while waiting for a batch."""
TIMEOUT_S = 60.0
"""Seconds to wait for a batch before giving up on the workers."""
SHARED_MEMORY = Path("/dev/shm")


def prefetched_micro_steps(num_workers: int) -> int:
    """Return how many micro-steps the loader may draw beyond the last batch it returned.

    A change of the curriculum's stage must be announced at least that many ahead.
    """
    return PREFETCH_PER_WORKER * num_workers


def check_shared_memory(
    mc: MCConfig, *, micro_batch_size: int, num_workers: int, processes: int
) -> None:
    """Raise ConfigError if `/dev/shm` is too small for the prefetched batches of this host's
    `processes` ranks.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    needed = processes * prefetched_micro_steps(num_workers) * batch_bytes(mc, micro_batch_size)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise ConfigError(
            f"data.num_workers = {num_workers}: the loaders of {processes} ranks on this host need "
            f"{needed / 1e6:.1f} MB of {SHARED_MEMORY}, which has {free / 1e6:.1f} MB free: remove "
            "files left there by dead processes, enlarge it (docker: --shm-size), or use 0 workers"
        )


def batch_bytes(mc: MCConfig, micro_batch_size: int) -> int:
    """Return the size of a micro-batch in bytes, at the context length for which it is largest."""
    sequence = 8 * (mc.seq_len + 1) + 4 * mc.horizon_tokens + 8
    plans = max(2 * 8 * mc.rows_at(length) * length for length in mc.wc_lengths)
    return micro_batch_size * (sequence + plans)


class LoadedBatches(Iterator[Batch]):
    """Iterator over the batches of `micro_steps`, in order; see `make_loader`."""

    def __init__(
        self,
        dataset: MicroBatchDataset,
        micro_steps: Iterable[MicroStep],
        *,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.failure: str | None = None
        """Why the loader processes were given up; None while they work."""
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
            # With forkserver, a signal could kill the server process that the workers depend on.
            multiprocessing_context="fork",
            worker_init_fn=_ignore_stop_signals,
            collate_fn=_shared,
            timeout=POLL_S,
        )
        others, before = active_children(), signal.getsignal(signal.SIGCHLD)
        self._loaded = iter(loader)
        self._workers = [child for child in active_children() if child not in others]
        # Remove torch's handler: it raises at an arbitrary point of the trainer if a worker dies.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def __next__(self) -> Batch:
        """Return the next batch. Raises whatever the dataset raises."""
        micro_step = next(self._micro_steps)
        if self._loaded is not None:
            try:
                return self._take(self._loaded)
            except (RuntimeError, OSError, EOFError) as error:
                self._give_up(error)
        batch = self._dataset[micro_step]
        return batch.pin_memory() if self._pin_memory else batch

    def _take(self, loaded: Iterator[Batch]) -> Batch:
        """Return the workers' next batch. Raises what they raise, or TimeoutError after TIMEOUT_S.

        Waits in a separate thread, because torch can wait forever, for a stopped worker or for a
        lock that a killed one held; that thread is then abandoned.
        """
        answer: SimpleQueue[Batch | BaseException] = SimpleQueue()
        Thread(target=_answer, args=(loaded, answer), name="batch", daemon=True).start()
        try:
            taken = answer.get(timeout=TIMEOUT_S + POLL_S)
        except Empty:
            raise TimeoutError(f"a worker timed out after {TIMEOUT_S:g} s") from None
        if isinstance(taken, BaseException):
            raise taken
        return taken

    def _give_up(self, error: BaseException) -> None:
        """Kill the workers and print a warning with the reason."""
        self.failure = _cause(error)
        print(
            f"warning: a data loader failed: {self.failure}; from now on the training process makes"
            " the batches, which is slower",
            file=sys.stderr,
            flush=True,
        )
        for worker in self._workers:
            worker.kill()
        _abandoned.append(self._loaded)
        self._loaded = None


_abandoned: list[object] = []
"""Iterators of killed workers, kept alive: their destructor would wait forever for a lock."""


def _answer(loaded: Iterator[Batch], answer: "SimpleQueue[Batch | BaseException]") -> None:
    try:
        answer.put(_next_batch(loaded))
    except BaseException as error:  # the trainer raises it
        answer.put(error)


def make_loader(
    dataset: MicroBatchDataset,
    micro_steps: Iterable[MicroStep],
    *,
    num_workers: int,
    pin_memory: bool,
) -> LoadedBatches:
    """Return an iterator over the batches of `micro_steps`, in order.

    `micro_steps` may be endless; it is consumed lazily (see `prefetched_micro_steps`). The global
    random state is not touched. Loader processes run one torch thread each (DataLoader's default);
    with `num_workers` 0 the calling process makes the batches.
    """
    return LoadedBatches(dataset, micro_steps, num_workers=num_workers, pin_memory=pin_memory)


def _shared(batch: Any) -> Any:
    """Move a batch to shared memory. As collate function it runs in the worker's main thread, where
    a full /dev/shm raises; in the queue's thread it would lose the batch silently.
    """
    return batch.share_memory()


def _next_batch(loaded: Iterator[Batch]) -> Batch:
    """Return the workers' next batch, retrying until TIMEOUT_S; each time-out of torch checks that
    all workers are alive.
    """
    for _ in range(round(TIMEOUT_S / POLL_S) - 1):
        try:
            return next(loaded)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
    return next(loaded)


def _cause(error: BaseException) -> str:
    """Return an error's last line, without the worker's traceback, and the free shared memory."""
    last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if not SHARED_MEMORY.is_dir():
        return last_line
    free = shutil.disk_usage(SHARED_MEMORY).free / 1e6
    return f"{last_line} ({SHARED_MEMORY} has {free:.1f} MB free)"


def _ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a loader process, except TERM from the trainer.

    Launchers signal whole process trees, but a trainer that finishes its step still needs batches.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(
        target=_exit_on_sigterm_from, args=(os.getppid(),), name="sigterm", daemon=True
    ).start()


def _exit_on_sigterm_from(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
