"""`Reader`: runs the backbone on contexts of tokens, at their positions in the history, and returns
its hidden states.

Legend: R rows, W entries, D width, H query heads, J key heads, C channels per head, Q queries, N
keys.
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gains.layout import Layout
from mc_ds.model.backbone import Backbone, DecoderBlock
from mc_ds.model.backbone.layers import BlockFunction, transformer_block
from mc_ds.model.positions import rotary_tables, rotate


class Reader:
    """Runs a backbone in evaluation mode."""

    def __init__(
        self, backbone: Backbone, layout: Layout, *, rows: int = 32, compiled: bool = False
    ) -> None:
        self.backbone, self.layout, self.rows = backbone, layout, rows
        self.device = backbone.embedding.weight.device
        self.blocks = [cast(DecoderBlock, block) for block in backbone.blocks]
        self._fast: BlockFunction = (
            torch.compile(transformer_block, dynamic=False) if compiled else transformer_block
        )

    def tables(self, starts_RW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary tables of tokens at their positions in the history."""
        config = self.backbone.config
        return rotary_tables(
            torch.zeros_like(starts_RW),
            starts_RW,
            block_size=self.layout.block_size,
            head_dim=config.dim // config.num_heads,
            base=config.rope_base,
        )

    def layers(
        self, ids: Tensor, starts_RW: Tensor, function: BlockFunction = transformer_block
    ) -> Iterator[Tensor]:
        """Yield the hidden states [R, W, D] of the tokens at `starts_RW` before each block, and
        finally the normed states after the last block.
        """
        cos, sin = self.tables(starts_RW)
        x = self.backbone.embedding(ids[starts_RW])
        for block in self.blocks:
            yield x
            x = function(x, cos, sin, block.weights(), block.shape)
        yield self.backbone.norm(x)

    def heads(self, layer: int, x_RWD: Tensor, starts_RW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotated queries [R, H, W, C] and keys [R, J, W, C] of block `layer` with input
        `x_RWD`.
        """
        weights, shape = self.blocks[layer].weights(), self.blocks[layer].shape
        count = shape.num_heads + shape.num_kv_heads
        width = (x_RWD.size(-1) // shape.num_heads) * count
        normed = F.rms_norm(x_RWD, x_RWD.shape[-1:], weights.attention_norm, shape.norm_eps)
        both = F.linear(normed, weights.qkv[:width]).unflatten(-1, (count, -1)).transpose(1, 2)
        q, k = rotate(both, *self.tables(starts_RW)).split(
            [shape.num_heads, shape.num_kv_heads], dim=1
        )
        return q, k

    def nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the loss in nats, float32, of final states [..., D]."""
        logits = self.backbone.head.logits(hidden.flatten(0, -2))
        return F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)

    def losses(self, ids: Tensor, blocks_RN: Tensor, entries_RE: Tensor) -> Tensor:
        """Return the losses [R, E] of tail entries (token indices) in contexts with the given
        blocks (ascending in each row).

        Processes `self.rows` rows at a time and pads the last batch, so that only one shape is
        compiled.
        """
        found = []
        for first in range(0, len(blocks_RN), self.rows):
            blocks, entries = (x[first : first + self.rows] for x in (blocks_RN, entries_RE))
            padded = blocks[
                torch.arange(self.rows, device=blocks.device).clamp(max=len(blocks) - 1)
            ]
            *_, final = self.layers(ids, self.layout.starts(padded), self._fast)
            places = entries - self.layout.seq_len + final.size(1)
            rows = torch.arange(len(blocks), device=self.device)[:, None]
            found.append(self.nll(final[rows, places], ids[entries + 1]))
        return torch.cat(found)


def attention_mass(q_HQC: Tensor, k_JNC: Tensor, allowed_QN: Tensor) -> Tensor:
    """Return the attention, float32 [H, Q, N], over the allowed keys."""
    keys = k_JNC.repeat_interleave(q_HQC.size(0) // k_JNC.size(0), dim=0)
    logits = (q_HQC.float() @ keys.float().transpose(1, 2)) * q_HQC.size(-1) ** -0.5
    return logits.masked_fill(~allowed_QN, -torch.inf).softmax(dim=-1)
