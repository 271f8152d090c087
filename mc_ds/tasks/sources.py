"""Tasks as training data: one task as a source, and several sources in fixed shares."""

from collections.abc import Sequence

from mc_ds.data.batch import Sample, TrainingSource
from mc_ds.data.sampling.interleave import Interleave
from mc_ds.tasks.base import Task


class TaskSource:
    """Training samples of a task. Only the answers count in a row's score."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def sample(self, index: int, stage: int) -> Sample:
        """Return sequence `index` of the task's stage `stage`."""
        sample = self._task.sample(index, stage)
        return Sample(sample.tokens, sample.horizon_mask)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how many passes over the task's text the first `samples` sequences make, keyed by
        name.
        """
        return self._task.epochs(samples)


class MixedSource:
    """Sources of equal T and h in fixed shares, each of which yields its own sequences in order.

    `parts` are (share, source). Raises ConfigError unless all shares are positive numbers.
    """

    def __init__(self, parts: Sequence[tuple[float, TrainingSource]], *, seed: int) -> None:
        self._sources = [source for _, source in parts]
        self._interleave = Interleave([share for share, _ in parts], seed=seed)

    def part(self, index: int) -> int:
        """Return which part sample `index` comes from; the same in every stage."""
        return self._interleave.place(index)[0]

    def sample(self, index: int, stage: int) -> Sample:
        """Return sample `index` of the mixture at `stage`."""
        part, within = self._interleave.place(index)
        return self._sources[part].sample(within, stage)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how many passes over the text of each part the first `samples` sequences make,
        keyed by the part's name.
        """
        counts = self._interleave.counts(samples)
        return {
            name: epochs
            for source, count in zip(self._sources, counts, strict=True)
            for name, epochs in source.epochs(count).items()
        }
