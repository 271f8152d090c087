"""`Interleave`: maps a sample index to a part of a mixture and an index within that part.

Every block of BLOCK samples has samples of each part in proportion to its share, in the order of a
keyed permutation. Within a part the indices are 0, 1, 2, ... without gaps, so that each part's
samples are drawn once per epoch of that part.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.sampling.windows import derive_key, permute

BLOCK = 256
"""Samples per block: many more than a step has, so that steps do not alternate between parts in a
fixed rhythm.
"""
_MIX = 0x4D4958
"""Constant that makes a mixture's keys differ from all others derived from the run's seed."""


class Interleave:
    """Interleaves the parts of a mixture in proportion to `shares` (positive; any sum).

    A pure function of shares, seed and index; the last block is cached only for speed. At the end
    of any block each part's total deviates from its exact share by fewer samples than there are
    parts. Raises ConfigError for shares that are not positive.
    """

    def __init__(self, shares: Sequence[float], *, seed: int) -> None:
        if not shares or not np.isfinite(shares).all() or min(shares) <= 0:
            raise ConfigError(
                f"shares of a mixture = {list(shares)}: should be one or more positive numbers"
            )
        exact = [Fraction(repr(float(share))) for share in shares]
        self._of_the_rest = [share / sum(exact[: n + 1]) for n, share in enumerate(exact)]
        """Share of each part in the sum of its own share and those of the parts before it."""
        self._seed = seed
        self._block = -1
        self._before: NDArray[np.int64] = np.zeros(len(exact), dtype=np.int64)
        self._parts: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def place(self, index: int) -> tuple[int, int]:
        """Return the part of sample `index` >= 0, and the sample's index within that part."""
        position = self._load_block(index // BLOCK, index)
        part = int(self._parts[position])
        return part, int(self._before[part] + np.count_nonzero(self._parts[:position] == part))

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples belong to each part."""
        position = self._load_block(samples // BLOCK, samples)
        found = np.bincount(self._parts[:position], minlength=len(self._before))
        return [int(count) for count in self._before + found]

    def _load_block(self, block: int, index: int) -> int:
        """Load `block` into the cache; return the position of `index` in it."""
        if block != self._block:
            before = np.array(self._apportioned(block * BLOCK), dtype=np.int64)
            inside = np.array(self._apportioned((block + 1) * BLOCK), dtype=np.int64) - before
            key = derive_key(self._seed, _MIX, block)
            order = [permute(position, BLOCK, key) for position in range(BLOCK)]
            self._parts = np.repeat(np.arange(len(before)), inside)[order]
            self._block, self._before = block, before
        return index - block * BLOCK

    def _apportioned(self, samples: int) -> list[int]:
        """Divide the first `samples` samples, whole blocks, among the parts.

        From the last part to the first, each takes its share rounded down and leaves the rest to
        the parts before it. Exact, and no part's count ever decreases as `samples` grows.
        """
        counts: list[int] = []
        for share in reversed(self._of_the_rest):
            counts.append(int(samples * share))
            samples -= counts[-1]
        return counts[::-1]
