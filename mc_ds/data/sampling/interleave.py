"""`Interleave`: which part of a mixture a sample belongs to, and its index within that part.

Samples come in blocks of BLOCK. Each block holds as many samples of each part as its share asks
for, in the order of a keyed permutation, and each part counts its own samples: a part reads its
windows 0, 1, 2, ... whatever the other parts are, so that each is drawn once per its epoch.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.sampling.windows import derive_key, permute

BLOCK = 256
"""Samples over which shares are kept and the order is random: enough for no step of training to
fall into a rhythm with the parts."""
_MIX = 0x4D4958
"""Sets the keys of a mixture apart from all others that a run derives from its seed."""


class Interleave:
    """A mixture of parts with fixed shares, which are positive and relative to their sum.

    A pure function of the shares, the seed and the index; remembers the last block only to save
    time. Among any first n samples a part has its share of the whole blocks, to within as many
    samples as there are parts. Raises ConfigError for shares that are not positive.
    """

    def __init__(self, shares: Sequence[float], *, seed: int) -> None:
        if not shares or not np.isfinite(shares).all() or min(shares) <= 0:
            raise ConfigError(
                f"shares {list(shares)} of a mixture must be positive numbers, at least one"
            )
        exact = [Fraction(repr(float(share))) for share in shares]
        self._of_the_rest = [share / sum(exact[: n + 1]) for n, share in enumerate(exact)]
        """Share of each part among itself and those before it."""
        self._seed = seed
        self._block = -1
        self._before: NDArray[np.int64] = np.zeros(len(exact), dtype=np.int64)
        self._parts: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def place(self, index: int) -> tuple[int, int]:
        """Return the part of sample `index` >= 0, and how many samples that part has before it."""
        position = self._look_at(index // BLOCK, index)
        part = int(self._parts[position])
        return part, int(self._before[part] + np.count_nonzero(self._parts[:position] == part))

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples belong to each part."""
        position = self._look_at(samples // BLOCK, samples)
        found = np.bincount(self._parts[:position], minlength=len(self._before))
        return [int(count) for count in self._before + found]

    def _look_at(self, block: int, index: int) -> int:
        """Make `block` the present one; return the position of `index` in it."""
        if block != self._block:
            before = np.array(self._apportioned(block * BLOCK), dtype=np.int64)
            inside = np.array(self._apportioned((block + 1) * BLOCK), dtype=np.int64) - before
            key = derive_key(self._seed, _MIX, block)
            order = [permute(position, BLOCK, key) for position in range(BLOCK)]
            self._parts = np.repeat(np.arange(len(before)), inside)[order]
            self._block, self._before = block, before
        return index - block * BLOCK

    def _apportioned(self, samples: int) -> list[int]:
        """Samples of each part at the end of whole blocks, exact and never decreasing: the last
        part takes its share, rounded down, and leaves the rest to those before it.
        """
        counts: list[int] = []
        for share in reversed(self._of_the_rest):
            counts.append(int(samples * share))
            samples -= counts[-1]
        return counts[::-1]
