"""The root module: maps tokens and a plan to losses in a single forward, because ZeRO-3 gathers
parameters only inside it.

tokens -> LOD0 nodes -> GistNet (all levels, one call) -> node table -> one gather with the plan ->
entries -> causal decoder with per-row rotary tables -> chunked cross-entropy. Entry (l, s) predicts
token s + K^l, the token after its span.

Legend: B sequences, T tokens, V visible tokens, G rows per sequence, R = B*G rows, W entries, h
horizon, M = W - h, D width, P tree nodes. Source: docs/model.md, "The forward of a micro-step".
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mc_ds.config import RunConfig
from mc_ds.geometry import label_positions, lod1_cover, node_index
from mc_ds.model.backbone import Backbone, HeadOutput
from mc_ds.model.gather import gather_entries
from mc_ds.model.gistnet import GistNet
from mc_ds.model.positions import rotary_tables


class ModelOutput(NamedTuple):
    """Results of a micro-step. All except `loss` are detached."""

    loss: Tensor
    """Scalar to backpropagate, in nats: mean loss of all entries + horizon_loss_weight * mean
    horizon score.
    """
    entry_nll: Tensor
    """Next-token loss of every entry, float32 [R, W]."""
    row_scores: Tensor
    """Mean loss of each row's horizon, weighted by the horizon mask, float32 [R]."""
    visible_entries: Tensor
    """The entries before the horizon that LensNet reads: those of the rows, [R, M, D], or with
    `random_blocks` those of the LOD1 cover, [B, M, D].
    """
    lod0: Tensor
    """Token embeddings [B, T, D], for LensNet's index."""
    horizon_likeliest: Tensor
    """The most likely next token of each horizon entry, int64 [R, h]; [0, h] in training mode."""


class NodeTable(NamedTuple):
    """Detached tree nodes, from which contexts are built without another call of the engine."""

    nodes: Tensor
    """[B, P, D], levels concatenated, LOD0 first."""
    lod0: Tensor
    """[B, T, D]."""


class Attention(NamedTuple):
    """The attention of the last tokens of a history when all of it is read as tokens."""

    mass: Tensor
    """Share of the attention that each token gets, float32 [B, V]. See `Backbone.attention`."""


class MegaContextModel(nn.Module):
    """Backbone and GistNet. With `num_random_variants` = 0 it is a plain language model without a
    GistNet.
    """

    def __init__(self, config: RunConfig, *, vocab_size: int) -> None:
        super().__init__()
        mc, backbone = config.mc, config.backbone
        self.mc = mc
        self.geometry = mc.geometry
        self.backbone = Backbone(
            backbone,
            vocab_size=vocab_size,
            activation_checkpointing=config.train.activation_checkpointing,
            loss_chunk_entries=config.train.loss_chunk_entries,
            fp8=config.train.precision == "fp8",
        )
        self.gistnet = (
            GistNet(
                dim=backbone.dim,
                block_size=mc.block_size,
                max_lod=mc.max_lod,
                num_layers=mc.gist_layers,
                width=config.gist_width,
                num_heads=config.gist_heads,
                std=backbone.init_std,
                activation_checkpointing=config.train.activation_checkpointing,
            )
            if mc.num_random_variants
            else None
        )
        self.graphed: Callable[..., ModelOutput] | None = None
        """Replacement of `micro_step` in training, such as its CUDA graph; None: not replaced."""

    def forward(
        self,
        tokens: Tensor,
        lods: Tensor | None = None,
        starts: Tensor | None = None,
        horizon_mask: Tensor | None = None,
        *,
        attended_by: int | None = None,
    ) -> ModelOutput | NodeTable | Attention:
        """Run one of three modes, by the arguments given:

        * `tokens` [B, T+1] and a plan `lods`, `starts` [R, W]: return a ModelOutput;
        * `tokens` [B, T+1] alone: return the detached NodeTable;
        * `tokens` [B, V] and `attended_by`: read all tokens at LOD0 and return the Attention of the
          last `attended_by` tokens.

        `horizon_mask` [B, h] weights the targets of the horizon (default: all 1). Rows of a
        sequence are adjacent, so G = R / B.
        """
        if attended_by is not None:
            return Attention(self._attention(tokens, attended_by))
        if lods is None or starts is None:
            assert lods is starts, "a plan is lods and starts together"
            nodes, lod0 = self._nodes(tokens)
            return NodeTable(nodes=nodes.detach(), lod0=lod0.detach())
        if horizon_mask is None:
            horizon_mask = torch.ones(tokens.size(0), self.mc.horizon_tokens, device=tokens.device)
        trains = self.training and torch.is_grad_enabled()
        function = self.graphed if self.graphed is not None and trains else self.micro_step
        return function(tokens, lods, starts, horizon_mask)

    def _nodes(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the node table [B, P, D] and the token embeddings [B, T, D]."""
        lod0 = self.backbone.embedding(tokens[:, : self.geometry.seq_len])
        if self.training and torch.is_grad_enabled():
            # Needed even if the embedding is frozen: ZeRO-3 releases GistNet's parameters when
            # gradients reach its input.
            lod0.requires_grad_()
        return (self.gistnet(lod0) if self.gistnet is not None else lod0), lod0

    def micro_step(
        self, tokens: Tensor, lods: Tensor, starts: Tensor, horizon_mask: Tensor
    ) -> ModelOutput:
        """Return the losses of a batch under a plan. See `forward`."""
        nodes, lod0 = self._nodes(tokens)
        entries = gather_entries(nodes, node_index(lods, starts, self.geometry))
        weights = entry_weights(lods.shape, horizon_mask, self.mc.horizon_loss_weight)
        entry_nll, likeliest, loss = self._losses(entries, tokens, lods, starts, weights)
        row_scores = horizon_scores(entry_nll, horizon_mask)
        assert loss is not None
        horizon = self.mc.horizon_tokens
        read = entries if not self.mc.random_blocks else self._lod1_cover(nodes)
        visible = read[:, : read.size(1) - horizon]
        return ModelOutput(
            loss,
            entry_nll.detach(),
            row_scores.detach(),
            visible.detach(),
            lod0.detach(),
            likeliest[:, -horizon:],
        )

    def _lod1_cover(self, nodes_BPD: Tensor) -> Tensor:
        """Return the entries of `geometry.lod1_cover` for each sequence, [B, n_1 + tail, D]."""
        lods, starts = lod1_cover(self.geometry, nodes_BPD.device)
        index = node_index(lods, starts, self.geometry)
        return gather_entries(nodes_BPD, index.expand(nodes_BPD.size(0), -1))

    @torch.no_grad()
    def _attention(self, tokens_BV: Tensor, queries: int) -> Tensor:
        starts = torch.arange(tokens_BV.size(1), device=tokens_BV.device)[None]
        tables = self._tables(torch.zeros_like(starts), starts)
        return self.backbone.attention(self.backbone.embedding(tokens_BV), *tables, queries)

    def _losses(
        self, entries: Tensor, tokens: Tensor, lods: Tensor, starts: Tensor, weights: Tensor
    ) -> HeadOutput:
        """Return each entry's loss on the token after its span, [R, W], their weighted sum, and in
        evaluation mode the most likely token there.
        """
        cos, sin = self._tables(lods, starts)
        positions = label_positions(lods, starts, self.mc.block_size)
        labels = tokens.gather(1, positions.view(tokens.size(0), -1)).view(lods.shape)
        return self.backbone.losses(entries, cos, sin, labels, weights)

    def _tables(self, lods: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary tables of a plan; see `rotary_tables`."""
        config = self.backbone.config
        return rotary_tables(
            lods,
            starts,
            block_size=self.mc.block_size,
            head_dim=config.head_dim,
            base=config.rope_base,
            scheme=self.mc.position_scheme,
        )


def horizon_scores(entry_nll_RW: Tensor, horizon_mask_Bh: Tensor) -> Tensor:
    """Average each row's loss over its horizon with the data's mask: [R], zero where the mask is
    empty.
    """
    mask_Rh = _horizon_of_rows(horizon_mask_Bh, entry_nll_RW.size(0))
    weight = mask_Rh.sum(dim=1)
    return (entry_nll_RW[:, -mask_Rh.size(1) :] * mask_Rh).sum(dim=1) / weight.clamp_min(1e-9)


def entry_weights(shape: tuple[int, ...], horizon_mask_Bh: Tensor, horizon_weight: float) -> Tensor:
    """Return the weight of each entry's loss in the loss to backpropagate, float32 [R, W], the
    `shape`: that of the mean over all entries, plus `horizon_weight` times that of the mean score.
    """
    rows, width = shape
    weights = torch.full((rows, width), 1 / (rows * width), device=horizon_mask_Bh.device)
    if horizon_weight:
        mask_Rh = _horizon_of_rows(horizon_mask_Bh, rows)
        shares_Rh = mask_Rh / mask_Rh.sum(dim=1, keepdim=True).clamp_min(1e-9)
        weights[:, -shares_Rh.size(1) :] += horizon_weight / rows * shares_Rh
    return weights


def _horizon_of_rows(horizon_mask_Bh: Tensor, rows: int) -> Tensor:
    return horizon_mask_Bh.repeat_interleave(rows // horizon_mask_Bh.size(0), dim=0)
