"""The decoder with a key/value cache over the entries of working contexts, several rows at once.

An entry's keys and values depend on the entries before it and on its rotary angles, so a cache
stays valid for the unchanged prefix of a context. `extend` keeps a prefix and computes the entries
after it; `step` appends one entry to every row, and `next_logits` one token. Results equal those of
a computation without a cache.

Legend: R rows, n new entries, D width, V vocabulary, H query heads, J key/value heads, C channels
per head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from mc_ds.model.backbone import Backbone, DecoderBlock
from mc_ds.model.backbone.layers import BlockShape, BlockWeights, for_fused_kernels, swiglu
from mc_ds.model.positions import rotate

SMALLEST_ROOM = 64
"""Initial capacity of the buffers, in entries per row."""

Tables = tuple[Tensor, Tensor]
"""Rotary tables [W, C/2] of all entries of a working context: cosines and sines."""


class Decoder:
    """The backbone's blocks over cached rows.

    `lengths` holds the number of valid entries per row. The buffers [layers, R, J, room + 1, C]
    grow with the longest row, up to `capacity` entries. A step writes inactive rows too, into the
    slot after their valid entries; the extra slot is for full rows.
    """

    def __init__(self, backbone: Backbone, *, rows: int, capacity: int) -> None:
        config, weight = backbone.config, backbone.embedding.weight
        shape = (config.num_layers, rows, config.num_kv_heads, 1, config.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.rows, self.capacity = rows, capacity
        self.lengths = [0] * rows
        self.backbone = backbone
        self.blocks = [
            (block.weights(), block.shape)
            for block in backbone.blocks
            if isinstance(block, DecoderBlock)
        ]

    def kept(self, cached: int, end: int) -> int:
        """Return how many of the `cached` leading entries `extend` should keep, of `end` entries in
        all, so that it costs least.
        """
        return cached

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
        """Compute entries that follow the first `keep` entries of a row, and return their normed
        final states [n, D], or only those of the `last` of them. The rotary tables [n, C/2] are
        those of the new entries.

        The row then has keep + n valid entries. Raises ValueError if that exceeds the capacity, or
        fewer than `keep` are cached.
        """
        added = entries_nD.size(0)
        end = self._end(row, added, keep)
        self._make_room(end)
        x, cos, sin = entries_nD[None], cos[None], sin[None]
        # The last query sees every key; without a prefix this is the ordinary causal mask.
        mask = causal_lower_right(added, end)
        for number, ((weights, shape), keys, values) in enumerate(
            zip(self.blocks, self.keys[:, row, None], self.values[:, row, None], strict=True), 1
        ):
            q, k, v = _heads(x, cos, sin, weights, shape)
            keys[:, :, keep:end], values[:, :, keep:end] = k, v
            if number == len(self.blocks) and last is not None:
                # No entry attends to the others' output any more.
                q, x, mask = q[:, :, -last:], x[:, -last:], causal_lower_right(last, end)
            k, v = for_fused_kernels(keys[:, :, :end], values[:, :, :end], shape.num_heads)
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=k.size(1) != shape.num_heads
            )
            x = _finish(x, mixed.transpose(1, 2).flatten(2), weights, shape)
        self.lengths[row] = end
        return self.backbone.norm(x)[0]

    @torch.no_grad()
    def step(
        self, entries_RD: Tensor, cos: Tensor, sin: Tensor, *, active: list[bool] | None = None
    ) -> Tensor:
        """Append one entry to every row and return their normed final states [R, D]; rotary tables
        are [R, C/2].

        Rows that are not `active` are computed too, but their valid entries do not change. Raises
        ValueError if an active row is full.
        """
        is_active, places = active or [True] * self.rows, self.lengths
        self._require_room(is_active)
        end, mask = max(places) + 1, None
        self._make_room(min(end, self.capacity))
        x, cos, sin = entries_RD[:, None], cos[:, None], sin[:, None]
        if self.rows > 1:
            rows, at = (
                torch.arange(self.rows, device=x.device),
                torch.tensor(places, device=x.device),
            )
            mask = (torch.arange(end, device=x.device) <= at[:, None])[:, None, None]
        for (weights, shape), keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            q, k, v = _heads(x, cos, sin, weights, shape)
            if mask is None:
                keys[:, :, places[0]], values[:, :, places[0]] = k[:, :, 0], v[:, :, 0]
            else:
                keys[rows, :, at], values[rows, :, at] = k[:, :, 0], v[:, :, 0]
            # Treat query heads that share a key head as several queries of that head, so that
            # keys and values are read once and not copied.
            grouped = q.reshape(self.rows, shape.num_kv_heads, -1, q.size(-1))
            mixed = F.scaled_dot_product_attention(
                grouped, keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )
            x = _finish(x, mixed.reshape(self.rows, 1, -1), weights, shape)
        self.lengths = [place + takes for place, takes in zip(places, is_active, strict=True)]
        return self.backbone.norm(x)[:, 0]

    @torch.no_grad()
    def next_logits(
        self, ids_R: Tensor, tables: Sequence[Tables | None], active: list[bool]
    ) -> Tensor:
        """Append one token to every active row and return the logits [R, V] of the token after it,
        float32. Valid until the next call; the caller may change them.

        `tables` has each active row's tables; the new entry is at index `lengths[row]`. The logits
        of other rows are undefined, and their valid entries do not change. Negative ids stand for
        any token.
        """
        given = next(of_row for of_row in tables if of_row is not None)
        parts = [
            [x[place : place + 1] for x in of_row] if takes and of_row else [x[:1] for x in given]
            for of_row, place, takes in zip(tables, self.lengths, active, strict=True)
        ]
        cos, sin = (torch.cat(part) for part in zip(*parts, strict=True))
        entries = self.backbone.embedding(ids_R.clamp_min(0))
        return self.backbone.head.logits(self.step(entries, cos, sin, active=active))

    def _end(self, row: int, added: int, keep: int) -> int:
        """Return the number of entries of a row that keeps some and gets others. Raises ValueError
        if these are too many, or fewer than `keep` are cached.
        """
        if not 0 <= keep <= self.lengths[row] or keep + added > self.capacity:
            raise ValueError(
                f"keep = {keep} and {added} new entries do not fit: {self.lengths[row]} are "
                f"cached, and a row has at most {self.capacity}"
            )
        return keep + added

    def _require_room(self, active: list[bool]) -> None:
        """Raise ValueError if an active row is full."""
        if any(
            takes and place == self.capacity
            for takes, place in zip(active, self.lengths, strict=True)
        ):
            raise ValueError(
                f"a row of {self.capacity} entries is full: use a decoder of larger capacity"
            )

    def _make_room(self, entries: int) -> None:
        """Grow the buffers to at least `entries` per row."""
        room = self.keys.size(3) - 1
        if entries > room:
            self._grow(min(self.capacity, max(entries, 2 * room, SMALLEST_ROOM)))

    def _grow(self, room: int) -> None:
        """Grow the buffers to `room` entries per row, and the extra slot."""
        added = room + 1 - self.keys.size(3)
        self.keys, self.values = (
            F.pad(buffer, (0, 0, 0, added)) for buffer in (self.keys, self.values)
        )


def _heads(
    x_RnD: Tensor, cos: Tensor, sin: Tensor, weights: BlockWeights, shape: BlockShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries [R, H, n, C], rotated keys and values [R, J, n, C] of one block."""
    normed = F.rms_norm(x_RnD, (x_RnD.size(-1),), weights.attention_norm, shape.norm_eps)
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    projected = (
        F.linear(normed, weights.qkv).unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    )
    rotated = rotate(projected[:, : heads + kv_heads], cos, sin)
    return rotated[:, :heads], rotated[:, heads:], projected[:, heads + kv_heads :]


def _finish(x_RnD: Tensor, mixed: Tensor, weights: BlockWeights, shape: BlockShape) -> Tensor:
    """Return the output [R, n, D] of a block, given its input and its attention output."""
    x_RnD = x_RnD + F.linear(mixed, weights.out)
    return x_RnD + swiglu(
        F.rms_norm(x_RnD, (x_RnD.size(-1),), weights.ffn_norm, shape.norm_eps),
        weights.gate_up,
        weights.down,
    )
