"""Handles the signals that ask a program to stop: TERM, INT and USR1.

The first signal is acknowledged with one line, and the run stops at the next step boundary after
saving a checkpoint. A second one ends the process. Where there is nothing to save
(`ending_at_once`: data preparation, evaluation) the first one already ends the process, with exit
code 128 + its number.

A thread reads the signals from a pipe, so that the second one works even while the main thread
waits in a collective. The main thread blocks the signals, and its child processes inherit the mask:
`timeout`, shells and Slurm signal whole process groups, but a run that finishes its step and saves
still needs its compile workers, loaders and converters (inductor waits forever for dead workers).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RELAY_WINDOW_S = 1.0
"""Seconds after the first signal in which further ones count as the same request, because
launchers relay signals and one request can arrive several times.
"""


class StopSignals:
    """Context manager that handles this process's stop signals. Enter it in the main thread, before
    starting other processes.

    `speaks`: print the acknowledgement. Set it on one rank only: all ranks get the signal.
    """

    def __init__(self, *, speaks: bool = False) -> None:
        self.reason: str | None = None
        """Why the program should stop; None if it should go on."""
        self._speaks = speaks
        self._unsaved: str | None = None
        self._before: dict[int, Any] = {}
        self._blocked_before: set[int] = set()
        self._wakeup_before = -1

    def request(self, reason: str) -> None:
        """Ask to stop for a reason other than a signal. The first reason is kept."""
        if self.reason is None:
            self.reason = reason

    @contextmanager
    def ending_at_once(self, remark: str) -> Iterator[None]:
        """Within the block, a stop signal prints `remark` (what is lost or kept) and ends the
        process immediately.
        """
        self._unsaved = remark
        try:
            yield
        finally:
            self._unsaved = None

    def __enter__(self) -> Self:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _empty_handler) for number in STOP_SIGNALS}
        threading.Thread(
            target=self._listen, args=(read,), name="stop-signals", daemon=True
        ).start()
        self._blocked_before = {
            int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        }
        return self

    def __exit__(self, *error: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # the thread reads the end of the pipe and ends

    def _listen(self, pipe: int) -> None:
        """Handle signals until the pipe is closed.

        After the first signal, sleep for the relay window, then empty the pipe. Arrival times
        cannot be compared instead: if this thread is not scheduled for seconds, a relayed signal
        that waits in the pipe would seem to be a second request.
        """
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if number := _next_stop_signal(pipe):
            self._acknowledge(signal.Signals(number).name)
            if self._unsaved is not None:
                os._exit(128 + number)
            self.request(signal.Signals(number).name)
            time.sleep(RELAY_WINDOW_S)
            _drain(pipe)
            if number := _next_stop_signal(pipe):
                os._exit(128 + number)
        os.close(pipe)

    def _acknowledge(self, name: str) -> None:
        if self._speaks:
            answer = self._unsaved or (
                "the run stops at the next step boundary, after a checkpoint; a second signal ends"
                " it at once"
            )
            print(f"{name} received: {answer}", file=sys.stderr, flush=True)


def _next_stop_signal(pipe: int) -> int:
    """Wait for a stop signal and return its number, or 0 once the pipe is closed. Ignores other
    signals.
    """
    while received := os.read(pipe, 1):
        if received[0] in STOP_SIGNALS:
            return received[0]
    return 0


def _drain(pipe: int) -> None:
    """Discard what is in the pipe."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while os.read(pipe, 4096):
            pass
    os.set_blocking(pipe, True)


def _empty_handler(number: int, frame: FrameType | None) -> None:
    """Do nothing. Python writes to the wake-up pipe only for signals that have a handler."""
