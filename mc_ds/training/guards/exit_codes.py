"""The exit codes of `launch/train.py`, and the exception that ends a run with one."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of every rank. A signal that arrives a second time ends the process at once
    with 128 + its number.
    """

    DONE = 0
    FAILED = 1
    CONFIG = 2
    RANKS_DIFFER = 80
    UNHEALTHY = 81
    HANG = 82
    STORAGE = 83
    LOADER = 84
    REQUEUE = 85

    @property
    def meaning(self) -> str:
        """Explanation for the user."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.DONE: "all steps are done",
    ExitCode.FAILED: "unexpected error, with its traceback",
    ExitCode.CONFIG: "a setting, the data or a checkpoint cannot work; nothing was changed",
    ExitCode.RANKS_DIFFER: "debug mode found ranks that no longer do the same",
    ExitCode.UNHEALTHY: (
        "health.max_bad_steps steps in a row were not finite; bad_steps/ in the run folder names"
        " their samples"
    ),
    ExitCode.HANG: "a rank made no progress for health.watchdog_timeout_s; start again, it resumes",
    ExitCode.STORAGE: (
        "a checkpoint or the record could not be written; older checkpoints are whole"
    ),
    ExitCode.LOADER: "a data loader failed; a checkpoint was saved: start again, it resumes",
    ExitCode.REQUEUE: (
        "stopped by SIGTERM, SIGINT or SIGUSR1 after a checkpoint: start again, it resumes"
    ),
}


class RunStopped(Exception):
    """Ends the run with one line and an exit code. `on_all_ranks`: every rank raises it with the
    same message, which only one prints.
    """

    def __init__(self, message: str, code: ExitCode, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.code, self.on_all_ranks = code, on_all_ranks


def exit_code_lines() -> str:
    """Return the table of codes, for --help and documentation."""
    return "\n".join(f"{code.value:>4}  {code.meaning}" for code in ExitCode)
