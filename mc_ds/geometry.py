"""LOD arithmetic: the nodes of a history, the possible lengths of a working context, and everything
derived from a plan.

A *plan* is two integer tensors, `lods` [R, W] and `starts` [R, W]: entry (l, s) is the tree node at
level l whose span starts at token s and covers K^l tokens. Gather indices, positions, labels,
prefix counts and LOD maps are computed from them without a loop over entries.

Legend: B sequences, T tokens, R rows, W entries, K block size, L coarsest level. Source:
docs/model.md, "Geometry".
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Levels of detail of a history of `seq_len` tokens.

    Raises ValueError for a field out of range, or where not even one block fits before the
    protected tail.
    """

    seq_len: int
    block_size: int
    max_lod: int
    recent_tokens: int

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size = {self.block_size}: a gist needs at least 2 children")
        if not 1 <= self.max_lod <= 3:
            raise ValueError(f"max_lod = {self.max_lod}: 1, 2 or 3 levels of gists are supported")
        if self.recent_tokens < 1:
            raise ValueError(f"recent_tokens = {self.recent_tokens} must be at least 1")
        if self.head_len < self.block_size:
            raise ValueError(
                f"seq_len = {self.seq_len} leaves no block of {self.block_size} tokens before the"
                f" {self.recent_tokens} recent ones: use seq_len >="
                f" {self.block_size + self.recent_tokens}"
            )

    @property
    def head_len(self) -> int:
        """Tokens before the tail, rounded down to whole blocks: the only tokens that may be
        collapsed.
        """
        return max(0, self.seq_len - self.recent_tokens) // self.block_size * self.block_size

    @property
    def node_counts(self) -> tuple[int, ...]:
        """Number of complete tree nodes per level, LOD0 first."""
        return tuple(self.seq_len // self.block_size**level for level in range(self.max_lod + 1))

    @property
    def head_nodes(self) -> tuple[int, ...]:
        """Number of complete tree nodes in the head per level, LOD0 first."""
        return tuple(self.head_len // self.block_size**level for level in range(self.max_lod + 1))

    @property
    def max_units(self) -> int:
        """c_max: the largest number of units of K - 1 entries that collapsing can remove."""
        return sum(self.head_nodes[1:])

    @property
    def coarsest_length(self) -> int:
        """Number of entries of the coarsest full cover."""
        return self.seq_len - self.max_units * (self.block_size - 1)

    def units(self, wc_length: int) -> int:
        """Return c, the number of units of K - 1 entries to remove from T to reach `wc_length`."""
        return (self.seq_len - wc_length) // (self.block_size - 1)

    def is_reachable(self, wc_length: int) -> bool:
        """Return True if a full cover of exactly `wc_length` entries exists."""
        removed = self.seq_len - wc_length
        return (
            0 <= removed <= self.max_units * (self.block_size - 1)
            and removed % (self.block_size - 1) == 0
        )

    def reachable_at_most(self, length: float) -> int:
        """Return the largest reachable length that is at most `length`, which may be a fraction
        such as a share of T. Raises ValueError where the coarsest cover is longer.
        """
        length += 1e-6  # W / T * T may come out slightly below W
        if length >= self.seq_len:
            return self.seq_len
        if length < self.coarsest_length:
            raise ValueError(
                f"a working context of {length:g} entries cannot cover {self.seq_len} tokens at"
                f" max_lod = {self.max_lod}: the coarsest cover has {self.coarsest_length} entries"
            )
        units = -int(-(self.seq_len - length) // (self.block_size - 1))
        return self.seq_len - units * (self.block_size - 1)

    def with_length(self, seq_len: int) -> "Geometry":
        """Return the same geometry over a history of `seq_len` tokens."""
        return replace(self, seq_len=seq_len)

    def check_wc_length(self, wc_length: int, name: str = "train_wc_length") -> "Geometry":
        """Return self if `wc_length` is reachable. Raises ValueError otherwise, naming the nearest
        reachable lengths below and above.
        """
        if self.is_reachable(wc_length):
            return self
        removed = max(0, self.seq_len - wc_length)
        units_below = -(-removed // (self.block_size - 1))
        near = [
            self.seq_len - units * (self.block_size - 1)
            for units in (units_below, units_below - 1)
            if 0 <= units <= self.max_units
        ] or [self.coarsest_length]
        raise ValueError(
            f"{name} = {wc_length} is not reachable from seq_len = {self.seq_len} by collapsing"
            f" blocks of {self.block_size} (lengths are {self.seq_len} - {self.block_size - 1}c,"
            f" from {self.coarsest_length}): use {' or '.join(map(str, near))}"
        )


def distant_blocks(geometry: Geometry, wc_length: int, chosen: int) -> int:
    """Return how many head blocks lie wholly before the latest tokens of a context of `wc_length`
    tokens that also holds the tail and `chosen` blocks from before these tokens.
    """
    tail = geometry.seq_len - geometry.head_len
    latest = max(0, wc_length - tail - chosen * geometry.block_size)
    return max(0, geometry.head_len - latest) // geometry.block_size


def lod1_cover(geometry: Geometry, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return the plan in which every head block is one gist: `lods` and `starts`, each int64
    [n_1 + tail].
    """
    gists = torch.arange(0, geometry.head_len, geometry.block_size, device=device)
    tail = torch.arange(geometry.head_len, geometry.seq_len, device=device)
    lods = torch.cat([torch.ones_like(gists), torch.zeros_like(tail)])
    return lods, torch.cat([gists, tail])


def spans(lods: Tensor, block_size: int) -> Tensor:
    """Return the number of tokens that each entry covers, K^l, int64 of the shape of `lods`."""
    return torch.pow(block_size, lods.long())


def node_index(lods: Tensor, starts: Tensor, geometry: Geometry) -> Tensor:
    """Return each entry's row in the node table, int64 [R, W].

    Computed by arithmetic alone: copying a table of offsets to the device would synchronise.
    """
    index = starts.long() // spans(lods, geometry.block_size)
    for level, count in enumerate(geometry.node_counts[:-1]):
        index = index + count * (lods > level)
    return index


def moments(lods: Tensor, starts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the mean s + (n-1)/2 and standard deviation sqrt((n^2-1)/12) of each entry's n token
    positions, float64 [R, W] each.
    """
    n = spans(lods, block_size).double()
    return starts.double() + (n - 1) / 2, ((n * n - 1) / 12).sqrt()


def label_positions(lods: Tensor, starts: Tensor, block_size: int) -> Tensor:
    """Return the index into tokens [T + 1] of each entry's target, int64 [R, W]: s + K^l, the token
    after its span.
    """
    return starts.long() + spans(lods, block_size)


def start_counts(starts: Tensor, seq_len: int) -> Tensor:
    """Return prefix counts int64 [R, T + 1]: element t is the number of entries that start before
    token t.
    """
    counts = torch.zeros(*starts.shape[:-1], seq_len + 1, dtype=torch.int64, device=starts.device)
    return counts.scatter_(-1, starts.long() + 1, 1).cumsum_(-1)


def lod_map(lods: Tensor, counts: Tensor) -> Tensor:
    """Return the LOD of the entry that covers each token, int64 [R, T]; -1 where none does.
    `counts` is the result of `start_counts`.
    """
    covering = counts[..., 1:] - 1
    lod = lods.long().gather(-1, covering.clamp_min(0))
    return torch.where(covering < 0, torch.full_like(lod, -1), lod)
