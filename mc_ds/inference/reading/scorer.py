"""`LensInput`: LensNet with input from a tree, as a module; its calls are captured as CUDA graphs.

A graph has fixed shapes: the context gets padding before its first entry, and the matched blocks
get some behind the last one, up to the next multiple of `MULTIPLE` of each. So one graph serves a
history until it has grown by many blocks.

Legend: R rows, M visible entries, D width, I width of index vectors, m matched blocks, X = 2 K
tokens of a block and the block before it, Q last tokens of the visible tail.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mc_ds.inference.tree.nets import TreeNets
from mc_ds.model.lensnet import LensNet
from mc_ds.model.lensnet.matches import ABSENT
from mc_ds.model.lensnet.meaning import REACH
from mc_ds.model.recording import Capturing

MULTIPLE = 256
"""Numbers of entries and of blocks are padded to multiples of this."""
MOST_ENTRIES = 4096
"""More entries, of all contexts together, are scored kernel by kernel, since a GPU takes longer to
compute LensNet's scores of them than the host to launch it.
"""
MOST_CAPTURED = 16
"""Number of graphs that are kept. The one that was not used for the longest time is given up first,
and its size must then be needed twice again: several sessions may take turns with more sizes, and a
capture costs many times what it saves once.
"""


class Matched(NamedTuple):
    """Blocks whose words are matched with the last words of the tail."""

    blocks_mX: Tensor
    """Tokens of the blocks, each after those of the block before it."""
    tail_Q: Tensor
    """Last tokens of the visible tail."""
    place_RM: Tensor
    """Index among the blocks of each entry's block; others than 0 .. m - 1 stand for none."""


class LensInput(nn.Module):
    """LensNet as a module that takes index vectors and tokens from a tree as input, instead of
    reading a batch of sequences. Not thread-safe.
    """

    def __init__(
        self, lensnet: LensNet, nets: TreeNets, capturing: Capturing | None = None
    ) -> None:
        """`nets` embed matched tokens. `capturing` captures the scores of contexts; None: nothing
        is captured.

        A size is captured when it is needed for the second time.
        """
        super().__init__()
        self.lensnet, self._nets = lensnet, nets
        self._capturing = capturing
        self._known: set[_Size] = set()
        """Sizes that were needed before."""
        self._fixed: dict[_Size, _FixedScorer] = {}
        """The latest use is the last item."""

    @torch.no_grad()
    def forward(
        self,
        entries_RMD: Tensor,
        lods_RM: Tensor,
        positions_RM: Tensor,
        index_RMI: Tensor | None,
        *matched: Tensor,
    ) -> Tensor:
        """Return LensNet's scores [R, M]. `matched` has the fields of `Matched` if LensNet has
        matches. Integers may be on the host, the rest is on LensNet's device.
        """
        given = Matched(*matched) if matched else None
        rows, entries = lods_RM.shape
        blocks = 0 if given is None else len(given.blocks_mX)
        size = _Size(rows, _multiple(entries), _multiple(blocks))
        if not self._is_captured(size):
            device = entries_RMD.device
            if given is not None:
                given = given._replace(place_RM=given.place_RM.to(device))
            return _scores(
                self.lensnet,
                self._nets,
                entries_RMD,
                lods_RM.to(device),
                positions_RM.to(device),
                index_RMI,
                given,
            )
        assert self._capturing is not None
        fixed = self._fixed.pop(size, None)
        if fixed is None:
            while len(self._fixed) >= MOST_CAPTURED:
                self._give_up(next(iter(self._fixed)))
            fixed = _FixedScorer(self.lensnet, self._nets, size, self._capturing)
        self._fixed[size] = fixed
        return fixed(entries_RMD, lods_RM, positions_RM, index_RMI, given)

    def _give_up(self, size: "_Size") -> None:
        """Delete the graph of this size, and forget that the size was needed."""
        del self._fixed[size]
        self._known.remove(size)

    def _is_captured(self, size: "_Size") -> bool:
        """Return whether contexts of this size are, or will now be, captured; remember the size."""
        before = size in self._known
        self._known.add(size)
        return self._capturing is not None and before and size.rows * size.entries <= MOST_ENTRIES


class _Size(NamedTuple):
    """Numbers of contexts, of entries of each, and of matched blocks."""

    rows: int
    entries: int
    blocks: int


class _FixedScorer:
    """LensNet's scores of contexts, with fixed memory for inputs and scores."""

    def __init__(self, lensnet: LensNet, nets: TreeNets, size: _Size, capturing: Capturing) -> None:
        self._lensnet, self._nets, self._capturing = lensnet, nets, capturing
        config, device = lensnet.config, lensnet.project.weight.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, room, blocks = size
        self._size = size
        self._entries: Tensor | None = None
        """[R, M, D], in the dtype of the first contexts."""
        self._index: Tensor | None = None
        if lensnet.index is not None:
            self._index = zeros(rows, room, config.lens_dim, dtype=torch.float32)
        self._integers = zeros(3, rows, room)
        """Level, position and place among the matched blocks of each entry."""
        self._matched: Matched | None = None
        if lensnet.matches is not None:
            self._matched = Matched(
                zeros(blocks, 2 * config.block_size),
                zeros(min(REACH, lensnet.tail_len)),
                self._integers[2],
            )
        self._counts = zeros(2)
        """Number of entries that are padding, and of blocks that are not."""
        self._scores = zeros(rows, room, dtype=torch.float32)
        self._replay: Callable[[], None] | None = None

    def __call__(
        self,
        entries_RMD: Tensor,
        lods_RM: Tensor,
        positions_RM: Tensor,
        index_RMI: Tensor | None,
        matched: Matched | None,
    ) -> Tensor:
        """Launch, and return the scores [R, M]; see `LensInput.forward`. The first call
        captures.
        """
        rows, room, _ = self._size
        padding = room - lods_RM.size(1)
        if self._entries is None:
            self._entries = entries_RMD.new_zeros(rows, room, entries_RMD.size(2))
        self._entries[:, padding:] = entries_RMD
        if self._index is not None and index_RMI is not None:
            self._index[:, padding:] = index_RMI
        # Padding: gists, in no block.
        integers = lods_RM.new_ones(3, rows, room)
        integers[2] = -1
        integers[0, :, padding:], integers[1, :, padding:] = lods_RM, positions_RM
        count = 0
        if self._matched is not None and matched is not None:
            count = len(matched.blocks_mX)
            integers[2, :, padding:] = matched.place_RM
            self._matched.blocks_mX[:count] = matched.blocks_mX
            self._matched.blocks_mX[count:] = ABSENT
            self._matched.tail_Q.copy_(matched.tail_Q)
        self._integers.copy_(integers, non_blocking=True)
        self._counts.copy_(torch.tensor([padding, count]), non_blocking=True)
        if self._replay is None:
            self._replay = self._capturing(self._compute)
        self._replay()
        return self._scores[:, padding:].clone()

    @torch.no_grad()
    def _compute(self) -> list[Tensor]:
        assert self._entries is not None
        lods, positions, _ = self._integers
        padding, count = self._counts.split(1)
        # Masks do not stop what is not finite, and other contexts left theirs in place of padding.
        is_padding = (torch.arange(self._size.entries, device=padding.device) < padding)[:, None]
        self._scores.copy_(
            _scores(
                self._lensnet,
                self._nets,
                self._entries.masked_fill(is_padding, 0),
                lods,
                positions,
                None if self._index is None else self._index.masked_fill(is_padding, 0),
                self._matched,
                padding,
                count,
            )
        )
        return [self._scores]


def _scores(
    lensnet: LensNet,
    nets: TreeNets,
    entries_RMD: Tensor,
    lods_RM: Tensor,
    positions_RM: Tensor,
    index_RMI: Tensor | None,
    matched: Matched | None,
    padding: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Return LensNet's scores [R, M]. If given, `padding` ([1]) is the number of leading entries
    that are padding, and `count` ([1]) that of the blocks that are not.
    """
    vectors = None
    if matched is not None:
        features = _block_features(lensnet, nets, matched, count)
        vectors = lensnet.spread_matches(features, lods_RM, matched.place_RM, count)
    return lensnet.score(entries_RMD, lods_RM, positions_RM, index_RMI, vectors, padding)


def _block_features(
    lensnet: LensNet, nets: TreeNets, matched: Matched, count: Tensor | None
) -> Tensor:
    """Return the features [1, m, F] of matched blocks."""
    vectors = None
    if lensnet.meaning is not None:
        own = matched.blocks_mX[:, matched.blocks_mX.size(1) // 2 :]
        of_blocks, of_tail = (
            nets.token_index(nets.embed(ids.flatten().clamp_min(0)))
            for ids in (own, matched.tail_Q)
        )
        vectors = of_blocks.view(1, *own.shape, -1), of_tail[None]
    return lensnet.block_features(matched.blocks_mX[None], matched.tail_Q[None], vectors, count)


def _multiple(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE
