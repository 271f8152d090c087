"""A decoder whose work is launched as CUDA graphs: the step for one token, and the recomputation of
the cache after a refocus.

Both launch hundreds of small kernels, and the host takes longer to launch them than the GPU to run
them. Here all shapes and addresses are fixed, so that the work can be captured once and then
launched as a whole: the buffers have their full size, lengths and rotary tables of the rows are on
the device, and attention masks the slots that are not valid. A recomputation is a *pass* over a
fixed number of entries, of which the last ones are padding.

Legend: R rows, S slots per row, D width, V vocabulary, H query heads, J key/value heads, C channels
per head, n entries of a pass.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.inference.decoding.decoder import Decoder, Tables
from mc_ds.model.backbone import Backbone
from mc_ds.model.backbone.layers import BlockShape, BlockWeights
from mc_ds.model.recording import Capturing, Recorder

SLOT_MULTIPLE = 64
"""The number of slots, and the number of entries of a pass, are multiples of this, so that
attention kernels can read masks as they are.
"""
MOST_WORK = 2**35
"""Largest number of multiplications per block in a pass. Above it a GPU takes longer to compute a
block than the host to launch its kernels, so that larger recomputations are launched one by one.
"""


class GraphedDecoder(Decoder):
    """A decoder whose `next_logits` and `extend` have fixed shapes and are captured.

    Computes the same as `Decoder`, up to rounding. A step reads all slots: its cost depends on the
    capacity, not on the lengths of the rows. It is captured at its first call.

    A recomputation is one pass over all slots, or over a half, a quarter, ... of them if fewer
    entries follow those that are kept. Each of these sizes is captured when it is needed for the
    second time, since a history that is read once is not worth a capture.
    """

    def __init__(
        self, backbone: Backbone, *, rows: int, capacity: int, recorder: Recorder | None = None
    ) -> None:
        """`recorder` captures steps and passes; default: as CUDA graphs."""
        super().__init__(backbone, rows=rows, capacity=capacity)
        self.capturing = Capturing(self.keys.device, recorder)
        self._step: _Step | None = None
        self._passes: dict[int, _Pass] = {}
        self._slots = _multiple(capacity + 1)
        self._sizes = self._pass_sizes()
        self._known: set[int] = set()
        """Sizes that were needed before."""

    def kept(self, cached: int, end: int) -> int:
        """Return 0 where a pass from the first entry on is not longer than the one that keeps the
        `cached` entries; see `Decoder.kept`.
        """
        size = self._size(end - cached)
        return 0 if size is not None and self._begins(size) else cached

    @torch.no_grad()
    def extend(
        self,
        row: int,
        entries_nD: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        keep: int,
        last: int | None = None,
    ) -> Tensor:
        """Compute entries that follow the first `keep` entries of a row; see `Decoder.extend`."""
        end = self._end(row, entries_nD.size(0), keep)
        size = self._size(entries_nD.size(0))
        if size is None or not self._is_known(size) or (keep and self._begins(size)):
            return super().extend(row, entries_nD, cos, sin, keep=keep, last=last)
        if size not in self._passes:
            self._fix()
            self._passes[size] = _Pass(self, size, begins=self._begins(size))
        states = self._passes[size](row, entries_nD, cos, sin, keep)
        self.lengths[row] = end
        return states[-last if last is not None else 0 :].clone()

    @torch.no_grad()
    def next_logits(
        self, ids_R: Tensor, tables: Sequence[Tables | None], active: list[bool]
    ) -> Tensor:
        """Append one token to every active row and return the logits after it; see
        `Decoder.next_logits`.
        """
        self._require_room(active)
        if self._step is None:
            self._fix()
            self._step = _Step(self)
        logits = self._step(ids_R, tables, self.lengths, active)
        self.lengths = [place + takes for place, takes in zip(self.lengths, active, strict=True)]
        return logits

    def _pass_sizes(self) -> list[int]:
        """Return the numbers of entries of passes: all that fit, about a half, a quarter, ..."""
        sizes = [_multiple(self.capacity)]
        while sizes[-1] > SLOT_MULTIPLE:
            sizes.append(_multiple(sizes[-1] // 2))
        weights, _ = self.blocks[0]
        # Of an entry: by all weights, and for logits and mixture by the keys and values of slots.
        attended = 2 * self._slots * weights.out.size(1)
        work = sum(weight.numel() for weight in weights) + attended
        return [size for size in sizes if size * work <= MOST_WORK]

    def _fix(self) -> None:
        """Give the buffers their full size and final address."""
        if self.keys.size(3) < self._slots:
            self._grow(self._slots - 1)

    def _size(self, entries: int) -> int | None:
        """Return the size of the shortest pass for that many entries; None if there is none."""
        return min((size for size in self._sizes if size >= entries), default=None)

    def _is_known(self, size: int) -> bool:
        """Return whether this size was needed before, and remember it."""
        if size in self._known:
            return True
        self._known.add(size)
        return False

    def _begins(self, size: int) -> bool:
        """Return whether passes of this size begin at the first entry: those over a full row."""
        return size >= self.capacity


def _multiple(count: int) -> int:
    return -(-count // SLOT_MULTIPLE) * SLOT_MULTIPLE


class _Step:
    """The step of a decoder whose buffers have their full size, with fixed memory for its inputs
    and its result.
    """

    def __init__(self, decoder: GraphedDecoder) -> None:
        self._capturing = decoder.capturing
        self._backbone, self._blocks = decoder.backbone, decoder.blocks
        self._keys, self._values = decoder.keys, decoder.values
        rows, slots, channels = decoder.rows, self._keys.size(3), self._keys.size(4)
        device = self._keys.device
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._progress = torch.zeros(2, rows, dtype=torch.int64, device=device)
        """Number of valid entries of each row; 1 if it is active, else 0."""
        self._cos, self._sin = torch.zeros(2, rows, slots, channels, device=device)
        """Rotary tables for both halves of the channels; sines of the first half are negated."""
        self._logits = torch.zeros(rows, self._backbone.head.weight.size(0), device=device)
        # What the host knows to be there.
        self._written_progress: tuple[list[int], list[bool]] | None = None
        self._written_tables: list[Tables | None] = [None] * rows
        self._replay: Callable[[], None] | None = None
        """Launches the captured step."""

    def __call__(
        self,
        ids_R: Tensor,
        tables: Sequence[Tables | None],
        lengths: list[int],
        active: list[bool],
    ) -> Tensor:
        """Launch the step, and return the logits [R, V]; see `Decoder.next_logits`. The first call
        captures it.
        """
        self._write(ids_R, tables)
        if self._replay is None:
            # All runs before the first launch write the same entries as that.
            self._replay = self._capturing(
                self._compute, before=partial(self._write_progress, lengths, active)
            )
        self._write_progress(lengths, active)
        self._replay()
        after = [place + takes for place, takes in zip(lengths, active, strict=True)]
        self._written_progress = after, list(active)
        return self._logits

    def _write(self, ids_R: Tensor, tables: Sequence[Tables | None]) -> None:
        """Write the inputs; tables only if they are others than those of the last step."""
        self._ids.copy_(ids_R)
        for row, of_row in enumerate(tables):
            if of_row is not None and of_row is not self._written_tables[row]:
                count = of_row[0].size(0)
                self._cos[row, :count], self._sin[row, :count] = _both_halves(*of_row)
                self._written_tables[row] = of_row

    def _write_progress(self, lengths: list[int], active: list[bool]) -> None:
        """Write the rows' lengths, and which are active, unless the last step left them there."""
        if self._written_progress != (lengths, active):
            progress = torch.tensor([lengths, active], dtype=torch.int64)
            self._progress.copy_(progress, non_blocking=True)

    @torch.no_grad()
    def _compute(self) -> list[Tensor]:
        """Append one token to every active row, and return the logits [R, V]: all in fixed memory,
        without synchronising.

        Rows that are not active are computed too, into the slot after their valid entries.
        """
        device, places = self._ids.device, self._progress[0]
        rows, slots = (torch.arange(size, device=device) for size in self._cos.shape[:2])
        cos, sin = (table[rows, places][:, None] for table in (self._cos, self._sin))
        hidden_RS = slots > places[:, None]
        mask = torch.zeros(hidden_RS.shape, dtype=self._keys.dtype, device=device)
        mask = mask.masked_fill(hidden_RS, -torch.inf)[:, None, None]
        x_RD = self._backbone.embedding(self._ids.clamp_min(0))
        for (weights, shape), keys, values in zip(
            self._blocks, self._keys, self._values, strict=True
        ):
            q_RHC, k_RJC, v_RJC = _heads(x_RD, cos, sin, weights, shape)
            keys[rows, :, places], values[rows, :, places] = k_RJC, v_RJC
            # Query heads that share a key head are several queries of that head.
            grouped = q_RHC.unflatten(1, (shape.num_kv_heads, -1))
            mixed = F.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=mask.expand(*grouped.shape[:3], -1)
            )
            _finish(x_RD, mixed.flatten(1), weights, shape)
        self._logits.copy_(F.linear(self._backbone.norm(x_RD), self._backbone.head.weight))
        self._progress[0] += self._progress[1]
        return [self._logits]


class _Pass:
    """A pass over `size` entries of one row, some of which may be padding, with fixed memory for
    its inputs and its result. The buffers of the decoder must have their full size.
    """

    def __init__(self, decoder: GraphedDecoder, size: int, *, begins: bool) -> None:
        """`begins`: whether the entries are the first ones of their row, not others after them."""
        self._capturing = decoder.capturing
        self._backbone, self._blocks, self._begins = decoder.backbone, decoder.blocks, begins
        self._keys, self._values = decoder.keys, decoder.values
        weight, channels = decoder.backbone.embedding.weight, self._keys.size(4)
        self._entries = weight.new_zeros(size, weight.size(1))
        self._cos, self._sin = torch.zeros(2, size, 1, channels, device=weight.device)
        """Rotary tables as in `_Step`."""
        self._place = torch.zeros(2, dtype=torch.int64, device=weight.device)
        """The row, and its number of entries before those of the pass."""
        self._states = torch.zeros_like(self._entries)
        self._replay: Callable[[], None] | None = None

    def __call__(self, row: int, entries_nD: Tensor, cos: Tensor, sin: Tensor, keep: int) -> Tensor:
        """Launch the pass, and return the normed final states [n, D], valid until the next call;
        see `Decoder.extend`. The first call captures it.
        """
        # What an earlier pass left behind these entries is padding.
        count = entries_nD.size(0)
        self._entries[:count] = entries_nD
        self._cos[:count, 0], self._sin[:count, 0] = _both_halves(cos, sin)
        self._place.copy_(torch.tensor([row, keep]), non_blocking=True)
        if self._replay is None:
            self._replay = self._capturing(self._compute)
        self._replay()
        return self._states[:count]

    @torch.no_grad()
    def _compute(self) -> list[Tensor]:
        """Write keys and values of all entries of the pass and return their states [n, D]: all in
        fixed memory, without synchronising.

        Padding is written behind the valid entries, where nothing reads it.
        """
        size, slots = self._entries.size(0), self._keys.size(3)
        rows, keep = (value.expand(size) for value in self._place.split(1))
        places = keep + torch.arange(size, device=keep.device)
        written = places.clamp_max(slots - 1)
        mask = None
        if not self._begins:
            hidden = torch.arange(slots, device=keep.device) > places[:, None]
            mask = torch.zeros(hidden.shape, dtype=self._keys.dtype, device=keep.device)
            mask = mask.masked_fill(hidden, -torch.inf)
        x_nD = self._entries.clone()
        for (weights, shape), keys, values in zip(
            self._blocks, self._keys, self._values, strict=True
        ):
            q_nHC, k_nJC, v_nJC = _heads(x_nD, self._cos, self._sin, weights, shape)
            keys[rows, :, written], values[rows, :, written] = k_nJC, v_nJC
            if mask is None:
                k, v = (part.transpose(0, 1) for part in (k_nJC, v_nJC))
            else:  # all slots of the row, once for every query head
                heads = torch.arange(shape.num_heads, device=keep.device)
                of_head = heads // (shape.num_heads // shape.num_kv_heads)
                k, v = (buffer[rows[:1], of_head] for buffer in (keys, values))
            mixed = F.scaled_dot_product_attention(
                q_nHC.transpose(0, 1)[None],
                k[None],
                v[None],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=k.size(0) != shape.num_heads,
            )
            _finish(x_nD, mixed[0].transpose(0, 1).flatten(1), weights, shape)
        self._states.copy_(self._backbone.norm(x_nD))
        return [self._states]


def _both_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotary tables [n, C] for both halves of the channels, from tables [n, C/2]. Sines of
    the first half are negated.
    """
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _heads(
    x_RD: Tensor, cos: Tensor, sin: Tensor, weights: BlockWeights, shape: BlockShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries [R, H, C], rotated keys and values [R, J, C] of one block. Tables are
    [R, 1, C].
    """
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    normed = F.rms_norm(x_RD, (x_RD.size(-1),), weights.attention_norm, shape.norm_eps)
    projected = F.linear(normed, weights.qkv).unflatten(-1, (heads + 2 * kv_heads, -1))
    turning = projected[:, : heads + kv_heads]
    swapped = turning.roll(turning.size(-1) // 2, dims=-1)
    torch.addcmul(turning * cos, swapped, sin, out=turning)
    return turning[:, :heads], turning[:, heads:], projected[:, heads + kv_heads :]


def _finish(x_RD: Tensor, mixed: Tensor, weights: BlockWeights, shape: BlockShape) -> None:
    """Add a block's attention output and then its feed-forward output to `x_RD`, in place."""
    x_RD.addmm_(mixed, weights.out.T)
    normed = F.rms_norm(x_RD, (x_RD.size(-1),), weights.ffn_norm, shape.norm_eps)
    gate, up = F.linear(normed, weights.gate_up).chunk(2, dim=-1)
    x_RD.addmm_(F.silu(gate).mul_(up), weights.down.T)
