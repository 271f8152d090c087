"""The exit codes of `launch/train.py`, and `RunStopped`, which ends a run with one."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every rank. (A second stop signal exits with 128 + its number instead.)"""

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
        """Explanation for users."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.DONE: "all steps are done",
    ExitCode.FAILED: "unexpected error; a traceback was printed",
    ExitCode.CONFIG: "invalid setting, data or checkpoint; nothing was changed",
    ExitCode.RANKS_DIFFER: "debug mode found that ranks differ",
    ExitCode.UNHEALTHY: (
        "health.max_bad_steps consecutive steps had a non-finite loss or gradient; bad_steps/ in"
        " the run folder lists their samples"
    ),
    ExitCode.HANG: (
        "a rank made no progress for health.watchdog_timeout_s; the same command resumes"
    ),
    ExitCode.STORAGE: (
        "a checkpoint or metrics.jsonl could not be written; older checkpoints are intact"
    ),
    ExitCode.LOADER: "a data loader failed; a checkpoint was saved, the same command resumes",
    ExitCode.REQUEUE: (
        "stopped by SIGTERM, SIGINT or SIGUSR1; a checkpoint was saved, the same command resumes"
    ),
}


class RunStopped(Exception):
    """Ends the run with a one-line message and an exit code.

    `on_all_ranks`: all ranks raise it with the same message, so only one prints it.
    """

    def __init__(self, message: str, code: ExitCode, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.code, self.on_all_ranks = code, on_all_ranks


def exit_code_lines() -> str:
    """Return the table of exit codes, for --help-all and the documentation."""
    return "\n".join(f"{code.value:>4}  {code.meaning}" for code in ExitCode)
