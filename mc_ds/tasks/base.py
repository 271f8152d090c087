"""What a task yields: a history with a question at its end, and the answers as its horizon.

Legend: T tokens, h horizon tokens. Horizon target i (0 .. h-1) is token T-h+1+i, which the entry
that starts at T-h+i predicts. Tokens up to T-h are visible when a working context is chosen
(LensNet reads those before T-h): history and question. The later ones are the horizon: answers
stand nowhere else but in the facts that were planted.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FINAL_STAGE = 2**31 - 1
"""A stage beyond any curriculum: tasks take a stage above their last one for the last one."""


@dataclass(frozen=True, eq=False)
class TaskSample:
    """One sequence of a task."""

    tokens: NDArray[np.int64]
    """[T + 1] token ids."""
    horizon_mask: NDArray[np.float32]
    """[h], 1 on the targets that are answers, else 0."""
    spans: NDArray[np.int64]
    """[n, 2] half-open token ranges of the history that matter, in the order in which the
    answers need them; n may be 0.
    """
    distractors: NDArray[np.int64]
    """[m, 2] ranges of the same kind that were not asked for, in reading order."""
    other: "TaskSample | None"
    """The same history with another question, its answers and spans; None where the task has no
    second question.
    """
    hops: int = 1
    """Spans of each answer, the asked one first: a reader of one knows where to find the next."""


class Task(Protocol):
    """A task at one sequence length. It must pickle, because loader processes hold copies of it."""

    @property
    def name(self) -> str:
        """Name in tables and files."""
        ...

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        """Return sequence `index` >= 0 of curriculum stage `stage`: a pure function of both and
        of the seed given at construction.
        """
        ...

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often the first `samples` sequences read the text they are made of, by the
        name of the text or of the task.
        """
        ...


def no_spans() -> NDArray[np.int64]:
    """Return an empty list of spans, [0, 2], for samples in which no place matters more than
    others.
    """
    return np.empty((0, 2), dtype=np.int64)
