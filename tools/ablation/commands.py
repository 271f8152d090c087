"""Runs commands as separate processes, with a log and a time limit, and ends all processes they
started.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE_S = 5.0
"""Seconds between asking a process to end and killing it."""
POLL_S = 0.05
REASON_LENGTH = 200
"""Characters of a failed command's last line that are kept."""


class Stop:
    """Stops all running commands when time is up or a signal arrives."""

    def __init__(self, after_s: float | None = None) -> None:
        self._deadline = time.monotonic() + after_s if after_s is not None else None
        self._asked = threading.Event()

    def ask(self) -> None:
        """Ask all commands to stop."""
        self._asked.set()

    def __bool__(self) -> bool:
        return self._asked.is_set() or (
            self._deadline is not None and time.monotonic() >= self._deadline
        )


def run_command(
    command: Sequence[str], *, log: Path, environ: Mapping[str, str], timeout_s: float, stop: Stop
) -> bool:
    """Run `command` in a separate session with its output in `log`. After `timeout_s`, or on
    `stop`, end it with all processes it started. Return whether it finished with exit code 0; if
    not, the end of the log says why.
    """
    deadline = time.monotonic() + timeout_s
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            start_new_session=True,
        )
        try:
            while process.poll() is None and not stop and time.monotonic() < deadline:
                time.sleep(POLL_S)
            code = process.poll()
        finally:
            _end(process)
    if code is None:
        with log.open("a") as output:
            output.write("\nerror: stopped\n" if stop else f"\nerror: over {timeout_s:g} s\n")
    return code == 0


def last_line(log: Path) -> str:
    """Return the line of a log that explains a failure: the last one that starts with `error:`,
    else the last that is not empty.
    """
    text = log.read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return ([*lines[-1:], *errors[-1:]] or ["it said nothing"])[-1][:REASON_LENGTH]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End all processes of a process's session, even if it has ended itself: ask first, kill after
    GRACE_S.
    """
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # it leads a separate session
