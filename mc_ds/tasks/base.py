"""What a task yields: a history with a question at its end, and the answers as its horizon.

Legend: T tokens, h horizon tokens. Horizon target i (0 .. h-1) is token T-h+1+i, predicted by the
entry that starts at T-h+i. Tokens up to T-h, history and question, are known when a working context
is chosen (LensNet reads those before T-h). The later tokens are the horizon. Before the horizon,
the answers occur only in the planted facts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError

FINAL_STAGE = 2**31 - 1
"""A stage beyond any curriculum; tasks treat every stage above their last one as the last one."""


@dataclass(frozen=True, eq=False)
class TaskSample:
    """One sequence of a task."""

    tokens: NDArray[np.int64]
    """[T + 1] token ids."""
    horizon_mask: NDArray[np.float32]
    """[h], 1 for targets that are answers, else 0."""
    spans: NDArray[np.int64]
    """[n, 2] half-open token ranges of the facts needed for the answers, in the order in which the
    answers need them; n may be 0.
    """
    distractors: NDArray[np.int64]
    """[m, 2] token ranges of the other facts, in reading order."""
    other: "TaskSample | None"
    """The same history with another question, its answers and spans; None if the task has none."""
    hops: int = 1
    """Number of spans per answer, first the one that the question names; each names the next."""


class Task(Protocol):
    """A task at one sequence length. Must be picklable, since loader processes hold copies of
    it.
    """

    @property
    def name(self) -> str:
        """Name in tables and files."""
        ...

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        """Return sequence `index` >= 0 of curriculum stage `stage`: a pure function of both and of
        the seed given at construction.
        """
        ...

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how many passes over their text the first `samples` sequences make, keyed by the
        name of the text or of the task.
        """
        ...


def no_spans() -> NDArray[np.int64]:
    """Return an empty list of spans, [0, 2], for samples without planted facts."""
    return np.empty((0, 2), dtype=np.int64)


@contextmanager
def errors_of(task: str) -> Iterator[None]:
    """Begin the message of any ConfigError with the task's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"task {task}: {error}") from None
