"""Loader processes in trouble: the batches are the same, the trouble is named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mc_ds.config import ConfigError, MCConfig
from mc_ds.data import Batch, LoadedBatches, MicroBatchDataset, MicroStep, Sample, workers
from mc_ds.data.workers import batch_bytes, check_shared_memory, make_loader
from tests.data.test_loader import assert_equal, tensors
from tests.support.factories import mc_config
from tests.support.processes import inherited
from tests.support.tiny_run import TIMEOUT_S

MC = mc_config(num_random_variants=3)
STEPS = [MicroStep(step, 0, MC.train_wc_length, 0) for step in range(12)]


class Numbers:
    """Sequences of their own index; `slow` ones take half a second."""

    def __init__(self, slow: tuple[int, ...] = ()) -> None:
        self.slow = slow

    def sample(self, index: int, stage: int) -> Sample:
        if index in self.slow:
            time.sleep(0.5)
        return Sample(np.full(MC.seq_len + 1, index), np.ones(MC.horizon_tokens, np.float32))


def dataset(
    slow: tuple[int, ...] = (), *, sequences: int = 2, mc: MCConfig = MC
) -> MicroBatchDataset:
    return MicroBatchDataset(
        Numbers(slow),
        mc,
        seed=1,
        micro_batch_size=sequences,
        rank=0,
        world_size=1,
        accumulation_steps=1,
    )


def loader(of: MicroBatchDataset, num_workers: int) -> LoadedBatches:
    return make_loader(of, STEPS, num_workers=num_workers, pin_memory=False)


def assert_all_there(batches: list[Batch], sequences: int = 2) -> None:
    assert [batch.micro_step for batch in batches] == STEPS
    assert_equal(batches, [dataset(sequences=sequences)[step] for step in STEPS])


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at workers each tenth of a second. Does not give up by itself."""
    monkeypatch.setattr(workers, "POLL_S", 0.1)
    monkeypatch.setattr(workers, "TIMEOUT_S", 1e4)


def test_killed_workers_are_named_and_replaced(
    watchful: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    batches = loader(dataset(), 2)
    assert signal.getsignal(signal.SIGCHLD) == handler, "or a death raises wherever the trainer is"
    taken = [next(batches)]
    monkeypatch.setattr(workers, "TIMEOUT_S", 5.0)  # a killed one may hold the loader's lock
    for worker in batches._workers:
        worker.kill()
    taken += batches
    assert_all_there(taken)
    assert batches.failure is not None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: a data loader failed: {batches.failure}")


def test_a_stuck_worker_is_not_waited_for(watchful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = loader(dataset(), 1)
    taken = [next(batches)]
    (worker,) = batches._workers
    monkeypatch.setattr(workers, "TIMEOUT_S", 2.0)
    os.kill(worker.pid or 0, signal.SIGSTOP)
    taken += batches
    assert_all_there(taken)
    assert "timed out" in str(batches.failure)
    worker.join(TIMEOUT_S)
    assert worker.exitcode == -signal.SIGKILL, "it must not outlive the trainer"


def test_a_slow_worker_is_waited_for(watchful: None) -> None:
    batches = loader(dataset(slow=(4, 9)), 1)
    assert_all_there(list(batches))
    assert batches.failure is None


FULL = """
import tests.data.test_workers as here
batches = here.loader(here.dataset(sequences=64), 2)
here.assert_all_there(list(batches), sequences=64)
print(batches.failure)
"""


def test_a_full_shared_memory_is_named_at_once(tmp_path: Path) -> None:
    """In a mount namespace whose `/dev/shm` has room for semaphores and no batch."""
    mount = "mount -t tmpfs -o size=128k shm /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("cannot mount a file system here")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, FULL],
        env=inherited(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "/dev/shm has " in done.stdout
    assert "timed out" not in done.stdout, "the worker itself says what is wrong"


def test_the_room_that_batches_need_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    full_sight = dict(num_random_variants=0, train_wc_length=MC.seq_len)
    for mc in (MC, mc_config(**full_sight)):
        batch = dataset(mc=mc)[STEPS[0]._replace(wc_length=max(mc.wc_lengths))]
        assert batch_bytes(mc, 2) == sum(tensor.nbytes for tensor in tensors(batch))
    needed = 3 * 2 * 2 * batch_bytes(MC, 2)
    options = dict(micro_batch_size=2, num_workers=2, processes=3)
    for free, refused in ((needed, False), (needed - 1, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(workers, "shutil", SimpleNamespace(disk_usage=lambda _, u=usage: u))
        if refused:
            with pytest.raises(ConfigError, match="the loaders of 3 ranks on this host need"):
                check_shared_memory(MC, **options)
            check_shared_memory(MC, **options | {"num_workers": 0})
        else:
            check_shared_memory(MC, **options)
