"""The backbone: a Llama-family causal decoder over working-context entries.

It takes embedded entries and rotary tables, and treats tokens and gists alike.

Legend: R rows, W entries, D width, V vocabulary, C channels per head.
"""

from torch import Tensor, nn

from mc_ds.config import BackboneConfig
from mc_ds.model.backbone.attended import Attended
from mc_ds.model.backbone.layers import TransformerBlock, residual_std
from mc_ds.model.backbone.loss import HeadOutput, LossHead
from mc_ds.model.backbone.recompute import run_blocks


class TokenEmbedding(nn.Embedding):
    """Token embeddings [V, D] with normally distributed initial weights."""

    def __init__(self, vocab_size: int, dim: int, *, std: float) -> None:
        self._std = std
        super().__init__(vocab_size, dim)

    def reset_parameters(self) -> None:
        """Draw the initial weights; called by the base constructor."""
        nn.init.normal_(self.weight, std=self._std)


class DecoderBlock(TransformerBlock):
    """One causal block. It is a ZeRO-3 leaf module: DeepSpeed gathers all its parameters at
    once.
    """

    def __init__(self, config: BackboneConfig, *, fp8: bool = False) -> None:
        super().__init__(
            dim=config.dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            ffn_dim=config.ffn_dim,
            causal=True,
            norm_eps=config.norm_eps,
            std=config.init_std,
            out_std=residual_std(config.init_std, config.num_layers),
            fp8=fp8,
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attended: Attended | None = None
    ) -> Tensor:
        """Run `TransformerBlock.forward`. If given, `attended` collects the block's attention here,
        where ZeRO-3 has gathered the weights.
        """
        if attended is not None:
            attended.add(x, cos, sin, self.weights(), self.shape)
        return super().forward(x, cos, sin)


class Backbone(nn.Module):
    """Embedding, causal blocks, final norm and loss head of the language model."""

    def __init__(
        self,
        config: BackboneConfig,
        *,
        vocab_size: int,
        activation_checkpointing: float = 0.0,
        loss_chunk_entries: int = 4096,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embedding = TokenEmbedding(vocab_size, config.dim, std=config.init_std)
        self.blocks = nn.ModuleList(DecoderBlock(config, fp8=fp8) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = LossHead(
            dim=config.dim,
            vocab_size=vocab_size,
            std=config.init_std,
            chunk_entries=loss_chunk_entries,
            tied=self.embedding.weight if config.tie_embeddings else None,
        )

    def hidden(self, entries_RWD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run embedded entries [R, W, D] through all blocks; return the normed final states [R, W,
        D].
        """
        share = self.activation_checkpointing
        return self.norm(run_blocks(self.blocks, entries_RWD, (cos, sin), recomputed=share))

    def attention(self, entries_RWD: Tensor, cos: Tensor, sin: Tensor, queries: int) -> Tensor:
        """Return the attention that the last `queries` entries give to each entry, float32 [R, W]:
        the mean over blocks, heads and queries.
        """
        attended, x = Attended(queries), entries_RWD
        for block in self.blocks:
            x = block(x, cos, sin, attended)
        return attended.mean()

    def losses(
        self,
        entries_RWD: Tensor,
        cos: Tensor,
        sin: Tensor,
        labels_RW: Tensor,
        weights_RW: Tensor | None = None,
    ) -> HeadOutput:
        """Return the next-token loss of every entry, [R, W], the most likely next token, [R, W]
        ([0, W] in training mode), and if weights are given the weighted sum of the losses.
        """
        hidden = self.hidden(entries_RWD, cos, sin)
        weights = None if weights_RW is None else weights_RW.flatten()
        nll, likeliest, loss = self.head(hidden.flatten(0, 1), labels_RW.flatten(), weights)
        width = labels_RW.size(1)
        return HeadOutput(nll.view(labels_RW.shape), likeliest.view(-1, width), loss)
