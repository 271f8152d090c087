"""Work that is killed before every one of its system calls that change files, one after the
other.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import mc_ds.storage.files as files
import mc_ds.storage.folders as folders

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.utime", "os.truncate"}
"""What the interpreter's audit says of changing file systems, beside opening for writing."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def kill_everywhere(
    prepare: Callable[[], None], work: Callable[[], None], check: Callable[[], None]
) -> int:
    """For n = 1, 2, ... until `work` gets to its end: `prepare`, `work` in a child that is
    killed before its n-th change, `check`.

    Returns the number of kills.
    """
    kills = 0
    while True:
        prepare()
        if (child := os.fork()) == 0:
            _work_until_killed(work, kills + 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, "the work failed: see its output"
        kills += 1
        try:
            check()
        except BaseException as error:
            error.add_note(f"after a kill before change {kills}")
            raise


def _work_until_killed(work: Callable[[], None], number: int) -> None:
    """Never returns."""
    try:
        _die_before(number)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _die_before(number: int) -> None:
    """Lets this process end before its change of that number, as SIGKILL does; a write of that
    number gets halfway.
    """
    changes = 0
    main_thread = threading.current_thread()

    def is_last() -> bool:
        nonlocal changes
        if threading.current_thread() is main_thread:  # locks renew their time in another
            changes += 1
        return changes == number

    def change() -> None:
        if is_last():
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and arguments[2] & WRITING):
            change()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (change(), function(*args, **kwargs))[1]

    def write(file: files.HashingFile, data: Any) -> int:
        if is_last():
            whole(file, memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(file, data)

    whole, files.HashingFile.write = files.HashingFile.write, write  # type: ignore[method-assign]
    os.fsync, folders._exchange = counted(os.fsync), counted(folders._exchange)
    sys.addaudithook(hear)
