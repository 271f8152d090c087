"""A decoder whose step for one token is one CUDA graph.

A step of `Decoder` launches hundreds of small kernels, and the host takes longer to launch them
than the GPU to run them. Here all shapes and addresses of a step are fixed, so that it can be
captured once and then launched as a whole: the buffers have their full size from the first step on,
lengths and rotary tables of the rows are on the device, and attention masks the slots that are not
valid. A refocus recomputes the cache in the same buffers, so the graph stays valid.

Legend: R rows, S slots per row, D width, V vocabulary, H query heads, J key/value heads, C channels
per head.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.inference.decoding.decoder import Decoder, Tables
from mc_ds.model.backbone import Backbone
from mc_ds.model.backbone.layers import BlockShape, BlockWeights
from mc_ds.model.recording import WARM_UP_RUNS, CudaRecorder, Recorder

SLOT_MULTIPLE = 64
"""The number of slots is a multiple of this, so that attention kernels can read the mask as it
is.
"""


class GraphedDecoder(Decoder):
    """A decoder whose `next_logits` has fixed shapes and is captured at its first call.

    Computes the same as `Decoder`, up to rounding. A step reads all slots: its cost depends on the
    capacity, not on the lengths of the rows.
    """

    def __init__(
        self, backbone: Backbone, *, rows: int, capacity: int, recorder: Recorder | None = None
    ) -> None:
        """`recorder` captures the step; default: as a CUDA graph."""
        super().__init__(backbone, rows=rows, capacity=capacity)
        self._recorder = recorder
        self._step: _Step | None = None

    @torch.no_grad()
    def next_logits(
        self, ids_R: Tensor, tables: Sequence[Tables | None], active: list[bool]
    ) -> Tensor:
        """Append one token to every active row and return the logits after it; see
        `Decoder.next_logits`.
        """
        self._require_room(active)
        if self._step is None:
            slots = -(-(self.capacity + 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
            self._grow(slots - 1)
            self._step = _Step(self, self._recorder)
        logits = self._step(ids_R, tables, self.lengths, active)
        self.lengths = [place + takes for place, takes in zip(self.lengths, active, strict=True)]
        return logits


class _Step:
    """The step of a decoder whose buffers have their full size, with fixed memory for its inputs
    and its result.
    """

    def __init__(self, decoder: Decoder, recorder: Recorder | None) -> None:
        self._recorder = recorder
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
            self._replay = self._captured(lengths, active)
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
                cos, sin = of_row
                self._cos[row, : len(cos)] = torch.cat([cos, cos], dim=-1)
                self._sin[row, : len(sin)] = torch.cat([-sin, sin], dim=-1)
                self._written_tables[row] = of_row

    def _write_progress(self, lengths: list[int], active: list[bool]) -> None:
        """Write the rows' lengths, and which are active, unless the last step left them there."""
        if self._written_progress != (lengths, active):
            self._progress.copy_(torch.tensor([lengths, active], dtype=torch.int64))

    def _captured(self, lengths: list[int], active: list[bool]) -> Callable[[], None]:
        """Capture the step and return what launches it. All runs before the first launch write the
        same entries as that.
        """
        with torch.cuda.device(self._keys.device) if self._keys.is_cuda else nullcontext():
            recorder = self._recorder or CudaRecorder()
            for _ in range(WARM_UP_RUNS):
                self._write_progress(lengths, active)
                recorder.warm_up(self._compute)
                self._written_progress = None
            self._write_progress(lengths, active)
            _, replay = recorder.record(self._compute)
            self._written_progress = None
        return replay

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
