"""`CachedRow`: one history's row in a decoder's cache, which other histories may share.

Legend: n cached entries.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mc_ds.inference.decoding.decoder import Decoder


def _none() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass
class CachedRow:
    """One row of a decoder, and the entries whose keys and values it holds."""

    decoder: Decoder
    row: int
    lods: NDArray[np.int64] = field(default_factory=_none)
    """LODs of the cached entries, [n]."""
    starts: NDArray[np.int64] = field(default_factory=_none)
    """First tokens of the cached entries, [n]."""

    def common_prefix(self, lods: NDArray[np.int64], starts: NDArray[np.int64]) -> int:
        """Return how many leading entries of a plan are cached."""
        size = min(len(self.lods), len(lods))
        differ = (self.lods[:size] != lods[:size]) | (self.starts[:size] != starts[:size])
        return int(differ.argmax()) if differ.any() else size

    def set_entries(self, lods: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        """Record that exactly these entries are valid; the buffers may hold more."""
        self.lods, self.starts = lods, starts
        self.decoder.lengths[self.row] = len(lods)

    def cut(self, count: int, block_size: int) -> None:
        """Keep the leading entries that cover only the first `count` tokens."""
        ends = self.starts + block_size**self.lods
        kept = int(np.searchsorted(ends, count, side="right"))
        self.set_entries(self.lods[:kept], self.starts[:kept])
