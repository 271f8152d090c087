"""Chunked cross-entropy: output head and next-token loss in one module, so that logits [R, W, V]
are never materialised.

Legend: E entries (R * W), D width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def chunk_nll(hidden_ED: Tensor, weight_VD: Tensor, labels_E: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label in nats, float32 [E]."""
    return F.cross_entropy(F.linear(hidden_ED, weight_VD).float(), labels_E, reduction="none")


class HeadOutput(NamedTuple):
    """Results of the head for every entry."""

    nll: Tensor
    """Loss in nats, float32."""
    likeliest: Tensor
    """The most likely next token, int64; empty in training mode."""


class LossHead(nn.Module):
    """Output projection and per-entry loss. Forward and backward hold the logits of at most
    `chunk_entries` entries at a time.

    `tied` is the embedding's parameter if the head shares it.
    """

    def __init__(
        self,
        *,
        dim: int,
        vocab_size: int,
        std: float,
        chunk_entries: int,
        tied: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = (
            nn.Parameter(torch.empty(vocab_size, dim).normal_(std=std)) if tied is None else tied
        )
        self.chunk_entries = chunk_entries
        self.chunk_nll = chunk_nll

    def forward(self, hidden_ED: Tensor, labels_E: Tensor) -> HeadOutput:
        """Return the loss of the labels (int64 [E]) and, in evaluation mode, the most likely token,
        [E] each.
        """
        chunks = list(
            zip(
                hidden_ED.split(self.chunk_entries), labels_E.split(self.chunk_entries), strict=True
            )
        )
        function = self.chunk_nll if self.training else chunk_nll
        nll = [
            checkpoint(
                function, hidden, self.weight, labels, use_reentrant=False, preserve_rng_state=False
            )
            for hidden, labels in chunks
        ]
        likeliest = [] if self.training else [self._likeliest(hidden) for hidden, _ in chunks]
        return HeadOutput(
            torch.cat(nll), torch.cat(likeliest) if likeliest else labels_E.new_empty(0)
        )

    def _likeliest(self, hidden_ED: Tensor) -> Tensor:
        return F.linear(hidden_ED, self.weight).argmax(dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of final states [..., D], float32. Not chunked: for few
        states.
        """
        return F.linear(hidden, self.weight).float()
