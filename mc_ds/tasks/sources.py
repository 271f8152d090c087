"""Tasks as training data: one task as a `SampleSource`, and several sources in fixed shares."""

from collections.abc import Sequence

import numpy as np

from mc_ds.config.errors import ConfigError
from mc_ds.data.batch import Sample, SampleSource
from mc_ds.data.sampler import derive_key
from mc_ds.tasks.base import Task

_MIX = 0x4D4958
"""Sets the keys of the mixture apart from all others that a run derives from its seed."""


class TaskSource:
    """Training samples of a task; only the answers count in the score of a row."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def sample(self, index: int, stage: int) -> Sample:
        """Return sequence `index` of the task's stage `stage`."""
        sample = self._task.sample(index, stage)
        return Sample(sample.tokens, sample.horizon_mask)


class MixedSource:
    """Draws each sample from one of several sources of equal T and h, chosen by a hash of (seed,
    index).

    `parts` are (share, source); shares are positive and relative to their sum. Raises
    ConfigError for others.
    """

    def __init__(self, parts: Sequence[tuple[float, SampleSource]], *, seed: int) -> None:
        shares = np.array([share for share, _ in parts], dtype=np.float64)
        if not shares.size or not np.isfinite(shares).all() or (shares <= 0).any():
            raise ConfigError(
                f"shares {[share for share, _ in parts]} of a mixture must be positive numbers, at"
                " least one"
            )
        self._sources = [source for _, source in parts]
        self._ends = np.cumsum(shares / shares.sum())[:-1]
        self._seed = seed

    def part(self, index: int) -> int:
        """Return which part sample `index` comes from, the same in every stage."""
        return int(
            np.searchsorted(self._ends, derive_key(self._seed, _MIX, index) / 2**64, side="right")
        )

    def sample(self, index: int, stage: int) -> Sample:
        """Sample `index` of its part."""
        return self._sources[self.part(index)].sample(index, stage)
