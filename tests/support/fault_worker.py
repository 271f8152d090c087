"""The process of a rank in tests of faults: imported once by the process that ranks are forked from, and sabotaged after the fork.

A fault is a function of this module that changes one rank from inside.
"""

import errno
import os
import signal
import sys
import sysconfig
import time

import torch
import torch._inductor.lowering  # DeepSpeed's check of the optimizer imports it otherwise, for seconds

import mc_ds.training.checkpoint.save as saving
import mc_ds.training.loop as loop
from launch.train import main
from mc_ds.data import MicroBatchDataset
from mc_ds.training.telemetry import MetricsWriter


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
    run = loop.StepRunner.run

    def sabotaged(self, number, *args, **kwargs):
        if number == step:
            action()
        return run(self, number, *args, **kwargs)

    loop.StepRunner.run = sabotaged


def die(step):
    before_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang(step):
    before_step(step, lambda: time.sleep(3600))


def raise_signal(step, number):
    before_step(step, lambda: os.kill(os.getpid(), number))


def slow_steps(seconds):
    """Makes every step take longer, so that there is time to interfere."""
    run = loop.StepRunner.run

    def slowed(*args, **kwargs):
        time.sleep(seconds)
        return run(*args, **kwargs)

    loop.StepRunner.run = slowed


def nan_gradients(*steps):
    """The gradient of one parameter is not a number on this rank."""
    run, build = loop.StepRunner.run, loop.build_engine
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

    loop.StepRunner.run, loop.build_engine = watched, sabotaged


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


def kill_in_step(number, delay):
    """Ends this rank `delay` seconds after it began the step of that number, counted from its start."""
    run, steps = loop.StepRunner.run, []

    def watched(*args, **kwargs):
        steps.append(None)
        if len(steps) == number:
            kill_soon(delay)
        return run(*args, **kwargs)

    loop.StepRunner.run = watched


def kill_in_save(name, delay):
    """Ends this rank `delay` seconds after its first call of a function of the saving module."""
    function = getattr(saving, name)

    def watched(*args, **kwargs):
        kill_soon(delay)
        return function(*args, **kwargs)

    setattr(saving, name, watched)


def kill_soon(delay):
    """From a process of its own, which needs nothing of this one."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(delay)
        if os.getppid() == victim:
            os.kill(victim, signal.SIGKILL)
        os._exit(0)


torch.set_num_threads(1)
