"""Stop signals to a whole process group, and to a process whose threads get no turn. A single
signal: test_health.py and test_faults.py.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mc_ds.console.signals import STOP_SIGNALS, StopSignals
from tests.support.processes import inherited
from tests.support.tiny_run import TIMEOUT_S


def start(program, folder, *arguments, **environ):
    """Starts a Python program as the leader of a process group of its own."""
    path = folder / "program.py"
    path.write_text(program)
    return subprocess.Popen(
        [sys.executable, path, *arguments],
        env=inherited(CUDA_VISIBLE_DEVICES="", **environ),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


STARVED = """
import ctypes, os, signal, sys, time
from mc_ds.console import signals
from mc_ds.console.signals import StopSignals
sys.setswitchinterval(100)  # no thread takes the interpreter from another
signals.RELAY_WINDOW_S = 3.0
with StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    while stop.reason is None:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)  # the relay, at once
    ctypes.PyDLL(None).usleep(4_000_000)  # a call that keeps the interpreter to itself
    time.sleep(0.5)
    print("alive", stop.reason, flush=True)
    while True:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_relay_that_is_read_late_is_no_second_signal(tmp_path):
    process = start(STARVED, tmp_path)
    assert process.communicate(timeout=TIMEOUT_S)[0] == "alive SIGTERM\n"
    assert process.returncode == 128 + signal.SIGINT  # a second signal is one still


CHILD = """
import os, subprocess, sys, time
from mc_ds.console.signals import StopSignals
with StopSignals() as stop:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    os.killpg(0, int(sys.argv[1]))
    while stop.reason is None:
        time.sleep(0.01)
    child.communicate()
    print(stop.reason, child.returncode)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_children_outlive_a_signal_to_the_process_group(number, tmp_path):
    process = start(CHILD, tmp_path, str(int(number)))
    assert process.communicate(timeout=TIMEOUT_S)[0] == f"{number.name} 0\n"


def test_signals_that_were_blocked_are_heard_inside_and_blocked_afterwards():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with StopSignals() as stop:
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | set(STOP_SIGNALS)
            os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + TIMEOUT_S
            while stop.reason is None and time.monotonic() < deadline:
                time.sleep(0.01)
        assert stop.reason == "SIGUSR1"
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR1}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


POOL = """
import os, sys, time
from torch._inductor.async_compile import AsyncCompile
from mc_ds.console.signals import StopSignals
if __name__ == "__main__":
    with StopSignals() as stop:
        AsyncCompile.warm_pool()
        AsyncCompile.process_pool().submit(abs, 1).result()
        job = AsyncCompile.process_pool().submit(os.open, sys.argv[1], os.O_RDONLY)
        print("compiling", flush=True)
        job.result()
        while stop.reason is None:
            time.sleep(0.01)
        print("compiled", stop.reason, flush=True)
    sys.exit(85)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_compile_workers_outlive_a_signal_to_the_process_group_but_not_their_run(killed, tmp_path):
    """The pool of compile workers that inductor uses on GPUs: were its processes to die of the
    signal, `result` would never return.
    """
    async_compile = pytest.importorskip("torch._inductor.async_compile")
    if not hasattr(async_compile.AsyncCompile, "process_pool"):
        pytest.skip("this torch has another pool")
    os.mkfifo(tmp_path / "compiled")  # a job lasts until somebody opens its other end
    process = start(POOL, tmp_path, tmp_path / "compiled", TORCHINDUCTOR_COMPILE_THREADS="2")
    workers, ends = [], []
    try:
        assert process.stdout.readline() == "compiling\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2  # the pool's own process and those it forks
        os.kill(process.pid, signal.SIGTERM)  # as `timeout` does: the process, then its group
        os.killpg(process.pid, signal.SIGTERM)
        if killed:
            process.kill()
        # Stays open: the job may be about to open the other end only now.
        ends.append(os.open(tmp_path / "compiled", os.O_RDWR))
        said, _ = process.communicate(timeout=TIMEOUT_S)
        assert (said, process.returncode) == (
            ("", -signal.SIGKILL) if killed else ("compiled SIGTERM\n", 85)
        )
        assert psutil.wait_procs(workers, timeout=TIMEOUT_S)[1] == []
    finally:
        process.kill()
        process.communicate()
        for end in ends:
            os.close(end)
        for worker in workers:
            if worker.is_running():
                worker.kill()
