"""The layout of a window of T tokens, of which contexts contain W.

A context consists of blocks of K tokens and the tail. The recency window is the context with the
last `recent` blocks before the tail; blocks before these are called distant. A slice is a horizon
of h entries in the tail, whose mean loss is measured. The slice's known tokens end with its first
horizon entry, whose label is the first prediction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Sizes of a window, in tokens (except `slices`)."""

    seq_len: int = 8192
    """Tokens T of a window."""
    wc_length: int = 1024
    """Tokens W of a context."""
    tail: int = 256
    """Tokens of the tail."""
    block_size: int = 32
    """Tokens K of a block."""
    horizon: int = 16
    """Entries h of a slice."""
    slices: int = 6
    """Number of slices."""
    stride: int = 32
    """Distance between the ends of consecutive slices."""

    def __post_init__(self) -> None:
        first = self.tail - self.stride * (self.slices - 1) - self.horizon
        if first < self.horizon:
            raise ValueError(
                f"{self.slices} slices every {self.stride} tokens leave {first} known tokens in a"
                f" tail of {self.tail}, but at least {self.horizon} are needed: use fewer slices,"
                " or a smaller stride"
            )
        if (self.seq_len - self.tail) % self.block_size or (
            self.wc_length - self.tail
        ) % self.block_size:
            raise ValueError(
                f"seq_len = {self.seq_len} and wc_length = {self.wc_length} must be multiples of"
                f" block_size = {self.block_size} after subtracting tail = {self.tail}"
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
        """Indices of the recency window's blocks, int64 [recent]."""
        return torch.arange(self.distant, self.blocks)

    @property
    def known(self) -> list[int]:
        """Index of each slice's last known token, which is also its first horizon entry."""
        ends = range(self.seq_len - self.stride * (self.slices - 1), self.seq_len + 1, self.stride)
        return [end - self.horizon for end in ends]

    def known_entries(self, last: int) -> Tensor:
        """Return the indices of each slice's last `last` known tokens, int64 [slices, last]."""
        return torch.tensor(self.known)[:, None] + torch.arange(1 - last, 1)

    def horizons(self) -> Tensor:
        """Return the token indices of each slice's horizon entries, int64 [slices, h]."""
        return torch.tensor(self.known)[:, None] + torch.arange(self.horizon)

    def starts(self, blocks_RN: Tensor) -> Tensor:
        """Return the token indices of contexts with these blocks (ascending in each row) and the
        tail, int64 [R, N K + tail].
        """
        offsets = torch.arange(self.block_size, device=blocks_RN.device)
        tokens = (blocks_RN[..., None] * self.block_size + offsets).flatten(1)
        tail = torch.arange(self.seq_len - self.tail, self.seq_len, device=blocks_RN.device)
        return torch.cat([tokens, tail.expand(len(tokens), -1)], dim=1)

    def replacing(self, distant_RN: Tensor) -> Tensor:
        """Return the block indices, int64 [R, recent], of contexts in which N distant blocks
        replace the N oldest recent ones.
        """
        rows, count = distant_RN.shape
        kept = self.recency[count:].to(distant_RN.device).expand(rows, -1)
        return torch.cat([distant_RN.sort(dim=1).values, kept], dim=1)
