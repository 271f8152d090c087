"""The process of a rank in tests of faults: imported once by the process that ranks are forked
from, and sabotaged after the fork.

A fault is a function of this module that changes one rank from inside.
"""

import errno
import multiprocessing
import os
import signal
import sys
import sysconfig
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch

# DeepSpeed's check of the optimizer imports it otherwise, for seconds
import torch._inductor.lowering

import mc_ds.training.checkpoint.save as saving
import mc_ds.training.loop as loop
from launch.train import main
from mc_ds.console.signals import StopSignals
from mc_ds.data import MicroBatchDataset, workers
from mc_ds.training.checkpoint import CheckpointSaver
from mc_ds.training.checkpoint.save import THREAD
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.step import StepRunner
from mc_ds.training.telemetry import MetricsWriter
from tests.support.tiny_run import TIMEOUT_S

FILE_OPERATIONS = {"open", "os.fsync", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""Audit events of the interpreter, and one that is not."""


def rank_main(folder, variables, arguments, fault, output):
    """The process of one rank."""
    os.environ.update({name: str(value) for name, value in variables.items()})
    get_path = sysconfig.get_path
    sysconfig.get_path = lambda name, *args, **kwargs: (
        str(folder / "library") if name == "stdlib" else get_path(name, *args, **kwargs)
    )
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    if fault is not None:
        globals()[fault[0]](*fault[1:])
    sys.exit(main(arguments))


def before_step(step, action):
    """Has `action` done before the optimizer step of that number."""
    run = StepRunner.run

    def sabotaged(self, number, *args, **kwargs):
        if number == step:
            action()
        return run(self, number, *args, **kwargs)

    StepRunner.run = sabotaged


def die(step):
    before_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def at_phase(action):
    """Has `action` done, with the run's watchdog and the name of the phase, before the watchdog
    notes a phase.
    """
    mark = Watchdog.mark

    def watched(self, phase):
        action(self, phase)
        mark(self, phase)

    Watchdog.mark = watched


def hang(step, released=None):
    """This rank never begins the step; the watchdog has patience until the file `released` is
    there.
    """
    watchdogs = []
    at_phase(lambda watchdog, phase: watchdogs.append(watchdog))

    def wait():
        while released is None or not Path(released).exists():
            time.sleep(0.05)
        watchdogs[-1].timeout_s = 3.0
        signal.pause()

    before_step(step, wait)


def lose_patience(step):
    """The watchdog of this rank waits 3 seconds, from that step on."""

    def shorten(watchdog, phase):
        if watchdog.step == step and phase == "data":
            watchdog.timeout_s = 3.0

    at_phase(shorten)


def pause(step, paused, released):
    """This rank says by a file that it has come to a step, and begins it when another file is there."""

    def wait():
        Path(paused).touch()
        while not Path(released).exists():
            time.sleep(0.05)

    before_step(step, wait)


def move_record(step, to):
    """Somebody moves the record away before that step."""
    record = Path(to).with_name("metrics.jsonl")
    before_step(step, lambda: record.rename(to))


def tell_phase(step, told):
    """Says when a phase of that step begins."""
    at_phase(
        lambda watchdog, phase: (
            print(f"begins {told}", flush=True) if (watchdog.step, phase) == (step, told) else None
        )
    )


def noted():
    """Returns what waits until this rank has noted a signal."""
    enter, entered = StopSignals.__enter__, []
    StopSignals.__enter__ = lambda self: entered.append(self) or enter(self)

    def wait():
        while entered[-1].reason is None:
            time.sleep(0.01)

    return wait


def raise_signal(step, number):
    """This rank gets, and notes, the signal before its forward of that step."""
    wait = noted()
    before_step(step, lambda: (os.kill(os.getpid(), number), wait()))


def raise_signal_in(name, number, after=0):
    """This rank gets, and notes, the signal in a call of a function or method of the loop, such
    as `Validator.run`: in the first, or `after` that many.
    """
    wait, calls = noted(), []
    *owner, attribute = name.split(".")
    holder = getattr(loop, owner[0]) if owner else loop
    action = getattr(holder, attribute)

    def sabotaged(*args, **kwargs):
        if len(calls) == after:
            os.kill(os.getpid(), number)
            wait()
        calls.append(None)
        return action(*args, **kwargs)

    setattr(holder, attribute, sabotaged)


def kill_workers(step):
    """The loader processes of this rank die before that step."""
    before_step(step, lambda: [child.kill() for child in multiprocessing.active_children()])


def little_shared_memory():
    """`/dev/shm` is full on this rank's host."""
    workers.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))


def prepare_forever():
    """This rank never returns from native code that prepares the data."""
    loop.open_run_data = lambda config, **_: (print("prepares", flush=True), signal.pause())


def wait_for_signal(step):
    """That step begins when this rank has noted a signal."""
    before_step(step, noted())


def nan_gradients(*steps):
    """The gradient of one parameter is not a number on this rank."""
    run, build = StepRunner.run, loop.build_engine
    here = {}

    def watched(self, number, *args, **kwargs):
        here["step"] = number
        return run(self, number, *args, **kwargs)

    def sabotaged(*args, **kwargs):
        engine = build(*args, **kwargs)
        parameter = next(
            parameter for name, parameter in engine.module.named_parameters() if "norm" in name
        )
        parameter.register_hook(lambda grad: grad * float("nan") if here["step"] in steps else grad)
        return engine

    StepRunner.run, loop.build_engine = watched, sabotaged


def full_disk(pattern, after=0):
    """Files whose name holds `pattern` do not fit on the disk, from the `after`-th on."""
    write, seen = saving.write_tensors, []

    def refused(path, state):
        if pattern in path.name:
            seen.append(path)
            if len(seen) > after:
                path.write_bytes(b"torn")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, state)

    saving.write_tensors = refused


def write_in_background_from(step):
    """No file of a checkpoint is written before that step begins."""
    begun, write = threading.Event(), saving.write_tensors
    before_step(step, begun.set)

    def patient(path, state):
        assert begun.wait(TIMEOUT_S), "training waits for the checkpoint"
        return write(path, state)

    saving.write_tensors = patient


def write_in_background_when_waited_for(step):
    """No file of a checkpoint is written before training waits for it after that step, and then
    slowly.
    """
    waited, write = threading.Event(), saving.write_tensors
    at_phase(
        lambda watchdog, phase: (
            waited.set() if (watchdog.step, phase) == (step, "checkpoint") else None
        )
    )

    def slow(path, state):
        assert waited.wait(TIMEOUT_S), "the run ends without the checkpoint"
        time.sleep(0.2)
        return write(path, state)

    saving.write_tensors = slow


def finish_writing(step, dies_at=None):
    """That step begins when this rank has written its files of a checkpoint. Kills this rank before
    step `dies_at`.
    """

    def join():
        for thread in threading.enumerate():
            if thread.name == THREAD:
                thread.join()

    before_step(step, join)
    if dies_at is not None:
        die(dies_at)


def little_memory(available):
    """The host of this rank has so many bytes of memory left."""
    saving.available_memory = lambda: available


def mute_record(step):
    """From the record of `step` on, `metrics.jsonl` cannot be written."""
    write = MetricsWriter.write

    def refused(self, number, metrics):
        if number >= step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        write(self, number, metrics)

    MetricsWriter.write = refused


def other_plans(step):
    """From `step` on this rank draws other variants than the others think."""
    plans = MicroBatchDataset.__getitem__

    def other(self, micro_step):
        batch = plans(self, micro_step)
        if micro_step.step >= step and self._rank == 1:
            batch.lods[-1], batch.starts[-1] = batch.lods[1].clone(), batch.starts[1].clone()
            batch.starts[-1][0] += 1
        return batch

    MicroBatchDataset.__getitem__ = other


def kill_in_step(number, phase):
    """Ends this rank where a phase begins, in its step of that number, counted from its start."""
    run, steps = StepRunner.run, []
    StepRunner.run = lambda *args, **kwargs: steps.append(None) or run(*args, **kwargs)
    at_phase(lambda watchdog, now: kill() if (len(steps), now) == (number, phase) else None)


def kill_in_save(number):
    """Ends this rank before its operation on files of that number, counted from its first save;
    the next saves count on.
    """
    begin, begun, operations = CheckpointSaver.begin, [], []
    CheckpointSaver.begin = lambda *args, **kwargs: begun.append(None) or begin(*args, **kwargs)
    savers = (threading.main_thread().name, THREAD)

    def count(event):
        if begun and event in FILE_OPERATIONS and threading.current_thread().name in savers:
            operations.append(event)
            if len(operations) == number:
                kill()

    fsync = os.fsync
    sys.addaudithook(lambda event, arguments: count(event))
    os.fsync = lambda handle: (count("os.fsync"), fsync(handle))[1]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
