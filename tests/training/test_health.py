"""Health and stopping, without a run: spikes of the loss, signals, the watchdog, exit codes, the
comparison of plans.
"""

import fcntl
import math
import os
import random
import signal
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest

from mc_ds.config import HealthConfig, RunConfig
from mc_ds.console import signals
from mc_ds.console.signals import RELAY_WINDOW_S, STOP_SIGNALS, StopSignals
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped, exit_code_lines
from mc_ds.training.guards.watchdog import Watchdog
from mc_ds.training.health import LossSpikes
from mc_ds.training.ranks.debug import check_table
from tests.support.processes import ROOT
from tests.support.tiny_run import TIMEOUT_S


def noise(steps, seed=0):
    rng = random.Random(seed)
    return [3.0 - 0.002 * step + rng.gauss(0, 0.05) for step in range(steps)]


def spikes(detector, losses):
    return [
        index
        for index, loss in enumerate(losses)
        if detector.check({"train/loss": loss}).get("train/loss_spike")
    ]


def test_noise_and_a_falling_loss_are_no_spikes():
    assert spikes(LossSpikes(HealthConfig()), noise(2000)) == []


def test_every_spike_is_seen_also_right_after_another():
    losses = noise(400)
    for index in (150, 151, 152, 300):
        losses[index] += 2.0
    assert spikes(LossSpikes(HealthConfig()), losses) == [150, 151, 152, 300]


def test_a_loss_that_is_not_finite_is_no_spike_and_changes_nothing():
    detector = LossSpikes(HealthConfig())
    spikes(detector, noise(100))
    before = detector.state_dict()
    assert detector.check({"train/loss": math.nan}) == {}
    assert detector.check({"train/loss": math.inf}) == {}
    assert detector.check({"val/loss": 1.0}) == {}
    assert detector.state_dict() == before


def test_spike_detection_continues_where_it_was():
    losses = noise(300)
    straight, first, second = (LossSpikes(HealthConfig(loss_spike_window=50)) for _ in range(3))
    expected = [straight.check({"train/loss": loss}) for loss in losses]
    for loss in losses[:120]:
        first.check({"train/loss": loss})
    second.load_state_dict(first.state_dict())
    assert [second.check({"train/loss": loss}) for loss in losses[120:]] == expected[120:]


def test_spike_detection_can_be_off():
    assert LossSpikes(HealthConfig(loss_spike_sigmas=0)).check({"train/loss": 1.0}) == {}


def until(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def unread(stop):
    """Bytes in the pipe of the thread that listens to signals."""
    return int.from_bytes(fcntl.ioctl(stop._write, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_its_relay_is_not_a_second_one(number, monkeypatch):
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    window = threading.Event()
    monkeypatch.setattr(signals, "time", SimpleNamespace(sleep=lambda seconds: window.wait()))
    with StopSignals() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        until(lambda: stop.reason is not None)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: unread(stop) == 1)
        window.set()
        until(lambda: unread(stop) == 0)  # and this process is still here
        assert stop.reason == number.name
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


SECOND_SIGNAL = f"""
import os, signal, time
from mc_ds.console.signals import StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGUSR1)
    while True:
        time.sleep({RELAY_WINDOW_S} / 2)
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_second_signal_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-c", SECOND_SIGNAL], cwd=ROOT, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 128 + signal.SIGINT


class Clock:
    """A clock that the test turns, and that counts how often the watchdog's thread looks at it."""

    def __init__(self):
        self.now, self.looks = 0.0, 0

    def monotonic(self):
        self.looks += threading.current_thread().name == "watchdog"
        return self.now


def test_the_watchdog_is_quiet_while_there_is_progress(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("mc_ds.training.guards.watchdog.time", clock)
    with Watchdog(0.3, 0, tmp_path) as watchdog:
        (thread,) = [each for each in threading.enumerate() if each.name == "watchdog"]
        for _ in range(3):
            clock.now += 0.2
            seen = clock.looks
            until(lambda seen=seen: clock.looks > seen)
            watchdog.mark("working")
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "after its end it does not bark either"
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_other_ranks_is_not_timed(tmp_path, monkeypatch):
    """Whoever is waited for has a watchdog of its own."""
    clock = Clock()
    monkeypatch.setattr("mc_ds.training.guards.watchdog.time", clock)
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, phase: ended.append(phase))
    with Watchdog(0.3, 0, tmp_path) as watchdog:
        for phase, note in (("theirs", watchdog.rest), ("mine", watchdog.mark)):
            note(phase)
            clock.now += 100.0
            seen = clock.looks
            until(lambda seen=seen: clock.looks > seen + 2 or ended)
    assert set(ended) == {"mine"}


def test_the_watchdog_must_come_before_the_timeout_of_collectives():
    with pytest.raises(
        ValueError,
        match=r"health.watchdog_timeout_s = 1200 must be below health.distributed_timeout_s = 600",
    ):
        RunConfig.model_validate({"health": {"distributed_timeout_s": 600}})


def test_every_exit_code_is_explained():
    lines = exit_code_lines().splitlines()
    assert [int(line.split()[0]) for line in lines] == [0, 1, 2, 80, 81, 82, 83, 84, 85]
    assert all(len(line.split()) > 3 for line in lines)


# Rows of the table are: own hash, hash of the neighbour's, step, micro-step, W, stage.


def test_equal_plans_pass():
    check_table([[11, 22, 5, 0, 40, 0], [22, 33, 5, 0, 40, 0], [33, 11, 5, 0, 40, 0]])
    check_table([[11, 11, 5, 0, 40, 0]])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([[11, 22, 5, 0, 40, 0], [22, 11, 6, 0, 40, 0]], "step 6 on rank 1, 5 on rank 0"),
        (
            [[11, 22, 5, 0, 40, 0], [22, 11, 5, 0, 52, 0]],
            "working-context length 52 on rank 1, 40 on rank 0",
        ),
        (
            [[11, 22, 5, 1, 40, 0], [23, 11, 5, 1, 40, 0]],
            r"rank 1's samples or variant plans differ from those that rank 0 computes for it \(step 5, micro-step 1\)",
        ),
        (
            [[12, 22, 5, 1, 40, 0], [22, 11, 5, 1, 40, 0]],
            r"rank 0's samples or variant plans differ from those that rank 1 computes for it",
        ),
    ],
)
def test_plans_that_differ_are_named(table, said):
    with pytest.raises(RunStopped, match=said) as error:
        check_table(table)
    assert error.value.code is ExitCode.RANKS_DIFFER
    assert error.value.on_all_ranks
