"""Signals that ask a program to stop: TERM, INT and USR1. The first is acknowledged at once, in
one line; a second one exits at once.

A run notes it and answers at the next step boundary, with a checkpoint. Where there is nothing
to save (`ending_at_once`: data preparation, evaluation) the first one already ends the process,
with 128 + its number.

Signals are read from a pipe by a thread of their own, so that the second one works even while
the main thread waits in a collective. Only that thread takes them: the main thread blocks them,
so every process it starts is born with them blocked. `timeout`, shells and Slurm signal whole
process groups, and a run that is to finish its step and save still needs its compilers, loaders
and converters: inductor waits forever for a pool of compile workers that has died.
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
"""Launchers pass on what they get, so that one request arrives several times: signals this close
to the first are the same request.
"""


class StopSignals:
    """While entered, collects stop signals of this process. Enter it in the main thread, before
    anything starts processes.

    `speaks` is where they are acknowledged: of several ranks, which are signalled together, one.
    """

    def __init__(self, *, speaks: bool = False) -> None:
        self.reason: str | None = None
        """Why to stop, or None."""
        self._speaks = speaks
        self._unsaved: str | None = None
        self._before: dict[int, Any] = {}
        self._blocked_before: set[int] = set()
        self._wakeup_before = -1

    def request(self, reason: str) -> None:
        """Ask to stop for another reason than a signal."""
        if self.reason is None:
            self.reason = reason

    @contextmanager
    def ending_at_once(self, remark: str) -> Iterator[None]:
        """Inside, a signal ends the process at once, whatever it waits for; `remark` says what
        becomes of its work.
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
        self._before = {
            number: signal.signal(number, _noted_by_the_thread) for number in STOP_SIGNALS
        }
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
        """The window is slept through and then emptied, not measured: a thread that gets no turn
        for seconds cannot take a relay, which has waited in the pipe, for a second request.
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
    """Wait for the number of a stop signal; 0 at the end of the pipe. Signals with other owners are
    passed over.
    """
    while received := os.read(pipe, 1):
        if received[0] in STOP_SIGNALS:
            return received[0]
    return 0


def _drain(pipe: int) -> None:
    """Drop what is in the pipe."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while os.read(pipe, 4096):
            pass
    os.set_blocking(pipe, True)


def _noted_by_the_thread(number: int, frame: FrameType | None) -> None:
    """A Python handler must exist for the wake-up pipe to be written."""
