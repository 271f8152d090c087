"""Signals that ask a run to stop: TERM, INT and USR1 are noted and answered at the next step boundary; a second one exits at once.

Signals are read from a pipe by a thread of their own, so that the second one works even while the main thread waits in a collective.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RELAY_WINDOW_S = 1.0
"""Launchers pass on what they get, so that one request arrives several times: signals this close to the first are the same request."""


class StopSignals:
    """While entered, collects stop signals of this process. Enter it in the main thread."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why to stop, or None."""
        self._first = 0.0
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    def request(self, reason: str) -> None:
        """Asks to stop for another reason than a signal."""
        if self.reason is None:
            self.reason, self._first = reason, time.monotonic()

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _noted_by_the_thread) for number in STOP_SIGNALS}
        threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # the thread reads the end of the pipe and ends

    def _listen(self) -> None:
        while received := os.read(self._read, 1):
            number = received[0]
            if number in STOP_SIGNALS:
                self._received(number)
        os.close(self._read)

    def _received(self, number: int) -> None:
        if self.reason is None:
            self.request(signal.Signals(number).name)
        elif time.monotonic() - self._first > RELAY_WINDOW_S:
            os._exit(128 + number)


def _noted_by_the_thread(number: int, frame: FrameType | None) -> None:
    """A Python handler must exist for the wake-up pipe to be written."""
