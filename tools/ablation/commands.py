"""Runs commands as separate processes with a log and a time limit, and ends all their child
processes.
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
"""Seconds between TERM and KILL."""
POLL_S = 0.05
REASON_LENGTH = 200
"""Maximum characters kept of a failed command's last line."""


class Stop:
    """True once all commands should stop: after `ask`, or `after_s` seconds after construction."""

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
    """Run `command` with its output in `log`; return whether it finished with exit code 0.

    After `timeout_s`, or on `stop`, it is ended with all its child processes. The end of the log
    then says so.
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
            output.write(
                "\nerror: stopped\n"
                if stop
                else f"\nerror: exceeded {timeout_s:g} s (--timeout_s)\n"
            )
    return code == 0


def last_line(log: Path) -> str:
    """Return the line of a log that explains a failure: the last that starts with `error:`, or else
    the last that is not empty.
    """
    text = log.read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return ([*lines[-1:], *errors[-1:]] or ["no output"])[-1][:REASON_LENGTH]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End all processes in a process's session, even if that process has ended: first with TERM,
    after GRACE_S with KILL.
    """
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # its id is that of its process group
