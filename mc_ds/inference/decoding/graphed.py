"""A decoder whose step for one token is one CUDA graph.

A step of `Decoder` launches hundreds of small kernels, and the host takes longer to launch them
than the GPU to run them. Here all shapes and addresses of a step are fixed, so that it can be
captured once and then launched as a whole: the buffers have their full size from the beginning,
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
        slots = -(-(capacity + 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
        self._grow(slots - 1)
        device, channels = self.keys.device, self.keys.size(-1)
        self._recorder = recorder
        self._replay: Callable[[], None] | None = None
        # Memory of the step's inputs and outputs.
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._progress = torch.zeros(2, rows, dtype=torch.int64, device=device)
        """Length of each row; 1 if it is active, else 0."""
        self._cos, self._sin = torch.zeros(2, rows, slots, channels, device=device)
        """Rotary tables of both halves of the channels; the first half of the sines is negative."""
        self._logits = torch.zeros(rows, backbone.head.weight.size(0), device=device)
        # What was last written there.
        self._known_progress: tuple[list[int], list[bool]] | None = None
        self._known_tables: list[Tables | None] = [None] * rows

    @torch.no_grad()
    def next_logits(
        self, ids_R: Tensor, tables: Sequence[Tables | None], active: list[bool]
    ) -> Tensor:
        """Append one token to every active row and return the logits after it; see
        `Decoder.next_logits`.
        """
        self._require_room(active)
        for row, of_row in enumerate(tables):
            if of_row is not None and of_row is not self._known_tables[row]:
                self._write_tables(row, of_row)
        self._ids.copy_(ids_R)
        if self._replay is None:
            self._replay = self._captured(active)
        self._write_progress(active)
        self._replay()
        self.lengths = [place + takes for place, takes in zip(self.lengths, active, strict=True)]
        self._known_progress = list(self.lengths), list(active)
        return self._logits

    @torch.no_grad()
    def compute_step(self) -> list[Tensor]:
        """Run the step once: append the tokens `_ids` to the active rows, and return their logits
        [R, V], in fixed memory.

        Never synchronises. Rows that are not active are computed too, into the slot after their
        valid entries.
        """
        rows, places = torch.arange(len(self._ids), device=self._ids.device), self._progress[0]
        cos, sin = (table[rows, places][:, None] for table in (self._cos, self._sin))
        slots = torch.arange(self.keys.size(3), device=self._ids.device)
        mask = torch.zeros(len(rows), len(slots), dtype=self.keys.dtype, device=slots.device)
        mask = mask.masked_fill(slots > places[:, None], -torch.inf)[:, None, None]
        x_RD = self.backbone.embedding(self._ids.clamp_min(0))
        for (weights, shape), keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            q_RHC, k_RJC, v_RJC = _heads(x_RD, cos, sin, weights, shape)
            keys[rows, :, places], values[rows, :, places] = k_RJC, v_RJC
            mixed = F.scaled_dot_product_attention(
                q_RHC.unflatten(1, (shape.num_kv_heads, -1)),
                keys,
                values,
                attn_mask=mask.expand(-1, shape.num_kv_heads, q_RHC.size(1) // keys.size(1), -1),
            )
            _finish(x_RD, mixed.flatten(1), weights, shape)
        self._logits.copy_(F.linear(self.backbone.norm(x_RD), self.backbone.head.weight))
        self._progress[0] += self._progress[1]
        return [self._logits]

    def _captured(self, active: list[bool]) -> Callable[[], None]:
        """Capture the step, and return a function that launches it. Leaves lengths and active rows
        on the device undefined.
        """
        on = self.keys.device
        with torch.cuda.device(on) if on.type == "cuda" else nullcontext():
            recorder = self._recorder or CudaRecorder()
            for _ in range(WARM_UP_RUNS):  # each writes the entries that the first launch will
                self._write_progress(active)
                recorder.warm_up(self.compute_step)
                self._known_progress = None
            self._write_progress(active)
            _, replay = recorder.record(self.compute_step)
        self._known_progress = None
        return replay

    def _write_progress(self, active: list[bool]) -> None:
        """Write lengths and active rows to the device, unless the last step left them there."""
        if self._known_progress != (self.lengths, active):
            self._progress.copy_(torch.tensor([self.lengths, active], dtype=torch.int64))

    def _write_tables(self, row: int, tables: Tables) -> None:
        cos, sin = tables
        self._cos[row, : len(cos)] = torch.cat([cos, cos], dim=-1)
        self._sin[row, : len(sin)] = torch.cat([-sin, sin], dim=-1)
        self._known_tables[row] = tables


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
