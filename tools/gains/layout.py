"""The layout of a window of T tokens, of which contexts contain W.

A context is a set of blocks of K tokens and, after them, the tail. The last `recent` blocks before
the tail with the tail are the recency window; the blocks before those are the distant ones. A slice
is a horizon of h entries in the tail: its loss is the mean over them. The known tokens of a slice
end with its first horizon entry, whose label is the first that is predicted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Sizes of a window; in tokens, except `slices`."""

    seq_len: int = 8192
    """T."""
    wc_length: int = 1024
    """W."""
    tail: int = 256
    block_size: int = 32
    """K."""
    horizon: int = 16
    """h, entries of a slice."""
    slices: int = 6
    stride: int = 32
    """Distance of the ends of consecutive slices."""

    def __post_init__(self) -> None:
        first = self.tail - self.stride * (self.slices - 1) - self.horizon
        if first < self.horizon:
            raise ValueError(
                f"{self.slices} slices every {self.stride} tokens leave {first} known tokens of a "
                f"tail of {self.tail}, at least {self.horizon} are needed"
            )
        if (self.seq_len - self.tail) % self.block_size or (
            self.wc_length - self.tail
        ) % self.block_size:
            raise ValueError(
                f"seq_len = {self.seq_len} and wc_length = {self.wc_length}, both less the tail of"
                f" {self.tail}, must be multiples of block_size = {self.block_size}"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks before the tail."""
        return (self.seq_len - self.tail) // self.block_size

    @property
    def recent(self) -> int:
        """Number of blocks of the recency window."""
        return (self.wc_length - self.tail) // self.block_size

    @property
    def distant(self) -> int:
        """Number of blocks before the recency window."""
        return self.blocks - self.recent

    @property
    def recency(self) -> Tensor:
        """Blocks of the recency window, int64 [recent]."""
        return torch.arange(self.distant, self.blocks)

    @property
    def known(self) -> list[int]:
        """Last known token of each slice, which is also its first horizon entry."""
        ends = range(self.seq_len - self.stride * (self.slices - 1), self.seq_len + 1, self.stride)
        return [end - self.horizon for end in ends]

    def known_entries(self, last: int) -> Tensor:
        """Return the last known tokens of every slice, int64 [slices, last]."""
        return torch.tensor(self.known)[:, None] + torch.arange(1 - last, 1)

    def horizons(self) -> Tensor:
        """Return horizon entries of every slice, as tokens, int64 [slices, h]."""
        return torch.tensor(self.known)[:, None] + torch.arange(self.horizon)

    def starts(self, blocks_RN: Tensor) -> Tensor:
        """Return the tokens of contexts of blocks (each row ascending) and the tail, int64 [R, N K
        + tail].
        """
        offsets = torch.arange(self.block_size, device=blocks_RN.device)
        tokens = (blocks_RN[..., None] * self.block_size + offsets).flatten(1)
        tail = torch.arange(self.seq_len - self.tail, self.seq_len, device=blocks_RN.device)
        return torch.cat([tokens, tail.expand(len(tokens), -1)], dim=1)

    def replacing(self, distant_RN: Tensor) -> Tensor:
        """Return the blocks of contexts in which distant blocks replace the N oldest recent ones,
        int64 [R, recent].
        """
        rows, count = distant_RN.shape
        kept = self.recency[count:].to(distant_RN.device).expand(rows, -1)
        return torch.cat([distant_RN.sort(dim=1).values, kept], dim=1)
