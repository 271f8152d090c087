"""Collect the attention of the last entries of a row while the decoder's blocks run.

Legend: R rows, W entries, D width, H query heads, J key/value heads, C channels per head, Q last
entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.model.backbone.layers import BlockShape, BlockWeights
from mc_ds.model.positions import rotate


class Attended:
    """Collects the attention of the last `queries` entries, block by block."""

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self._blocks: list[Tensor] = []

    def add(
        self, x_RWD: Tensor, cos: Tensor, sin: Tensor, weights: BlockWeights, shape: BlockShape
    ) -> None:
        """Compute and store the attention of a block with input `x_RWD`; rotary tables are [R or 1,
        W, C/2].
        """
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        width = x_RWD.size(1)
        normed = F.rms_norm(x_RWD, (x_RWD.size(-1),), weights.attention_norm, shape.norm_eps)
        projected = F.linear(normed, weights.qkv).unflatten(-1, (heads + 2 * kv_heads, -1))
        rotated = rotate(projected.transpose(1, 2)[:, : heads + kv_heads], cos, sin)
        q_RHQC = rotated[:, :heads, -self.queries :].float()
        k_RHWC = rotated[:, heads:].float().repeat_interleave(heads // kv_heads, dim=1)
        logits = q_RHQC @ k_RHWC.transpose(-1, -2) * q_RHQC.size(-1) ** -0.5
        places = torch.arange(width, device=x_RWD.device)
        later = places > places[-q_RHQC.size(2) :, None]
        self._blocks.append(logits.masked_fill(later, -torch.inf).softmax(dim=-1).mean(dim=(1, 2)))

    def mean(self) -> Tensor:
        """Return the mean over blocks, heads and queries, float32 [R, W]; each row sums to 1."""
        return torch.stack(self._blocks).mean(dim=0)
