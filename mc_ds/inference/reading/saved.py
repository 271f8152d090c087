"""A working context read from a file, and its validation.

Legend: W entries, n_1 head blocks.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import ConfigError, MCConfig
from mc_ds.inference.reading.window import Window


@dataclass(frozen=True, eq=False)
class SavedContext:
    """A working context read from a file, not yet validated."""

    path: Path
    known: int
    """Number of known tokens when it was chosen."""
    first: int
    """First token of its window."""
    lods: NDArray[np.int64]
    starts: NDArray[np.int64]
    rescored: NDArray[np.float32] | None = None

    def check(self, window: Window, mc: MCConfig) -> None:
        """Raise ConfigError unless this is a valid context of `window`."""
        if self.first != window.first:
            raise self.damaged(f"its window begins at token {self.first}, not at {window.first}")
        for array in (self.lods, self.starts):
            if array.dtype != np.int64 or array.shape != (window.length,):
                raise self.damaged(
                    f"an array is {array.dtype} {array.shape}, not int64 ({window.length},)"
                )
        if self.lods.min() < 0 or self.lods.max() > mc.max_lod:
            raise self.damaged(
                f"levels {self.lods.min()} to {self.lods.max()}, not 0 to {mc.max_lod}"
            )
        spans, end = mc.block_size**self.lods, window.first + window.seq_len
        first = window.first if window.geometry is not None else end - window.length
        bounds = np.append(self.starts, end)
        tail = self.lods[-min(window.length, mc.recent_tokens) :]
        if window.gaps:
            recent = np.arange(end - len(tail), end)
            tiled = bounds[0] >= first and (np.diff(bounds) >= 1).all() and not self.lods.any()
            tiled = tiled and (self.starts[-len(tail) :] == recent).all()
        else:
            tiled = bounds[0] == first and (np.diff(bounds) == spans).all()
        if not tiled or (self.starts % spans).any() or tail.any():
            raise self.damaged("its entries do not cover the history")
        if self.rescored is not None:
            blocks = 0 if window.geometry is None else window.geometry.head_nodes[1]
            if self.rescored.dtype != np.float32 or self.rescored.shape != (blocks,):
                raise self.damaged(
                    f"scores {self.rescored.dtype} {self.rescored.shape}, not float32 ({blocks},)"
                )

    def damaged(self, what: str) -> ConfigError:
        """Return the ConfigError for an invalid context; `what` says what is wrong."""
        return ConfigError(
            f"the saved session {self.path.parent} is damaged ({self.path.name}: {what}): save it "
            "again"
        )
