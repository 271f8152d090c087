"""Commands as processes of their own: with a log, a time limit, and nothing left behind."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE_S = 5.0
"""Seconds between asking a process to end and ending it."""
POLL_S = 0.05
REASON_LENGTH = 200
"""Characters of a failed command's last line that are kept."""


class Stop:
    """Tells all running commands that the call ends: when time is up, or when somebody asks."""

    def __init__(self, after_s: float | None = None) -> None:
        self._deadline = time.monotonic() + after_s if after_s is not None else None
        self._asked = threading.Event()

    def ask(self) -> None:
        """End the call."""
        self._asked.set()

    def __bool__(self) -> bool:
        return self._asked.is_set() or (
            self._deadline is not None and time.monotonic() >= self._deadline
        )


def run_command(
    command: Sequence[str], *, log: Path, environ: Mapping[str, str], timeout_s: float, stop: Stop
) -> bool:
    """Run `command` in a session of its own, its output in `log`; ends it, with all it started,
    after `timeout_s` or on `stop`.

    Returns whether it finished with exit code 0; if not, the end of the log says why.
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
    """Return the last line of a log that says what went wrong: the last one that starts with
    `error:`, else the last that is not empty.
    """
    text = log.read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return ([*lines[-1:], *errors[-1:]] or ["it said nothing"])[-1][:REASON_LENGTH]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process's session: first asked, then forced; its helpers too, should it have gone
    without them.
    """
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # it leads a session of its own
