"""GistNet: computes one learned gist for every block of K children, at every level, in one call.

A level embedding is added to the children, non-causal transformer blocks mix them, and their mean
goes through an MLP head. The result is added to the mean of the children, which is scaled at
initialisation to the RMS of a child (a mean of K independent vectors has only 1/sqrt(K) of it).

Legend: B sequences, T tokens, D width, K block size, P nodes of the level below, L coarsest level.
Source: docs/model.md, "GistNet".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_ds.model.backbone.layers import (
    EncoderBlock,
    Projection,
    plain_tables,
    residual_std,
)
from mc_ds.model.backbone.recompute import run_blocks


class GistNet(nn.Module):
    """Computes the gists of all levels.

    Because it is a ZeRO-3 leaf module, it is called once per forward, with one tensor as input and
    output, and with the same shapes on every rank.
    """

    ROPE_BASE = 10_000.0

    def __init__(
        self,
        *,
        dim: int,
        block_size: int,
        max_lod: int,
        num_layers: int,
        width: int,
        num_heads: int,
        std: float,
        activation_checkpointing: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.block_size, self.max_lod, self.head_dim = block_size, max_lod, width // num_heads
        self.level_embedding = nn.Parameter(torch.empty(max_lod, width).normal_(std=std))
        self.residual_gain = nn.Parameter(torch.full((max_lod, 1), block_size**0.5))
        self.project = Projection(dim, width, std=dim**-0.5) if width != dim else nn.Identity()
        self.blocks = nn.ModuleList(
            EncoderBlock(width, num_heads, std=std, out_std=residual_std(std, num_layers))
            for _ in range(num_layers)
        )
        self.pool_norm = nn.RMSNorm(width)
        self.head_up = Projection(width, 2 * dim, std=std)
        self.head_down = Projection(2 * dim, dim, std=0.0)

    def forward(self, lod0_BTD: Tensor) -> Tensor:
        """Return the node table [B, T + T//K + T//K^2 + ..., D] of LOD0 nodes [B, T, D]. Incomplete
        blocks at the end get no gist.
        """
        levels = [lod0_BTD]
        for level in range(1, self.max_lod + 1):
            levels.append(self.gists(levels[-1], level))
        return torch.cat(levels, dim=1)

    def gists(self, nodes_BPD: Tensor, level: int) -> Tensor:
        """Return the gists [B, P//K, D] at `level` of the nodes of the level below, [B, P, D]."""
        batch, below, dim = nodes_BPD.shape
        count = below // self.block_size
        if count == 0:  # the history is shorter than one span of this level
            return nodes_BPD.new_empty(batch, 0, dim)
        children = nodes_BPD[:, : count * self.block_size].reshape(
            batch * count, self.block_size, dim
        )
        x = self.project(children) + self.level_embedding[level - 1]
        tables = plain_tables(self.block_size, self.head_dim, self.ROPE_BASE, x.device)
        x = run_blocks(self.blocks, x, tables, recomputed=self.activation_checkpointing)
        update = self.head_down(F.gelu(self.head_up(self.pool_norm(x.mean(dim=1)))))
        gist = self.residual_gain[level - 1] * children.mean(dim=1) + update
        return gist.view(batch, count, dim)
