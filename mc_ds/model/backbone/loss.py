"""Chunked cross-entropy: output head and next-token loss in one module, so that logits [R, W, V]
are never materialised.

In training the loss is a sum with weights that are known beforehand, so that its gradients are
computed in the forward pass, from the logits that are there anyway. Otherwise the backward pass
computes the logits again, chunk by chunk.

Legend: E entries (R * W), D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def chunk_nll(hidden_ED: Tensor, weight_VD: Tensor, labels_E: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label in nats, float32 [E]."""
    return F.cross_entropy(F.linear(hidden_ED, weight_VD).float(), labels_E, reduction="none")


class ChunkGradients(NamedTuple):
    """Losses of a chunk of entries, and the gradients of their weighted sum."""

    nll: Tensor
    """Loss of each entry in nats, float32 [E]."""
    hidden: Tensor
    """Gradient of the final states, [E, D]."""
    weight: Tensor | None
    """Gradient of the output projection, [V, D]; None if it is frozen."""


def chunk_gradients(
    hidden_ED: Tensor, weight_VD: Tensor, labels_E: Tensor, weights_E: Tensor, trained: bool
) -> ChunkGradients:
    """Return losses and gradients of sum(weights * nll); that of the projection if `trained`."""
    log_shares_EV = F.linear(hidden_ED, weight_VD).float().log_softmax(dim=-1)
    nll = F.nll_loss(log_shares_EV, labels_E, reduction="none")
    is_label = torch.arange(weight_VD.size(0), device=labels_E.device) == labels_E[:, None]
    gradient_EV = (log_shares_EV.exp() - is_label.float()) * weights_E[:, None]
    gradient_EV = gradient_EV.to(hidden_ED.dtype)
    of_weight = gradient_EV.t() @ hidden_ED if trained else None
    return ChunkGradients(nll, gradient_EV @ weight_VD, of_weight)


class _WeightedLoss(torch.autograd.Function):
    """The weighted sum of all losses, with gradients from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ED: Tensor,
        weight_VD: Tensor,
        labels_E: Tensor,
        weights_E: Tensor,
        function: Callable[..., ChunkGradients],
        chunk_entries: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss (0-d) and the losses of all entries, float32 [E], not differentiable."""
        trained = ctx.needs_input_grad[1]
        inputs = (hidden_ED, labels_E, weights_E)
        chunks = zip(*(x.split(chunk_entries) for x in inputs), strict=True)
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        of_weight: Tensor | None = None
        for hidden, labels, weights in chunks:
            found = function(hidden, weight_VD, labels, weights, trained)
            losses.append(found.nll)
            gradients.append(found.hidden)
            if of_weight is None:
                of_weight = found.weight
            elif found.weight is not None:
                of_weight += found.weight
        nll = torch.cat(losses)
        ctx.save_for_backward(torch.cat(gradients), of_weight)
        ctx.mark_non_differentiable(nll)
        return (nll * weights_E).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the stored gradients times the loss's own."""
        of_hidden, of_weight = ctx.saved_tensors
        scaled = None if of_weight is None else _times(of_weight, upstream)
        return _times(of_hidden, upstream), scaled, None, None, None, None


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x` times `factor` (0-d) in the type of `x`, rounded once: 1 / accumulation steps in
    bf16 would be off by up to 0.2 %, for all gradients alike.
    """
    # The factor keeps its type because it has a dimension. A GPU stores nothing but the result.
    return torch.mul(x, factor.float().view(1), out=torch.empty_like(x))


class HeadOutput(NamedTuple):
    """Results of the head."""

    nll: Tensor
    """Loss of every entry in nats, float32; detached if there is a `loss`."""
    likeliest: Tensor
    """The most likely next token of every entry, int64; empty in training mode."""
    loss: Tensor | None = None
    """Weighted sum of the losses (0-d), if weights were given."""


class LossHead(nn.Module):
    """Output projection and loss. Forward and backward hold the logits of at most `chunk_entries`
    entries at a time.

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
        self.chunk_gradients = chunk_gradients

    def forward(
        self, hidden_ED: Tensor, labels_E: Tensor, weights_E: Tensor | None = None
    ) -> HeadOutput:
        """Return the loss of the labels (int64 [E]), in evaluation mode the most likely token, [E]
        each, and if `weights_E` are given their weighted sum.
        """
        if weights_E is None or not (self.training and torch.is_grad_enabled()):
            output = self._entries(hidden_ED, labels_E)
            if weights_E is None:
                return output
            return output._replace(loss=(output.nll * weights_E).sum(), nll=output.nll.detach())
        loss, nll = _WeightedLoss.apply(
            hidden_ED, self.weight, labels_E, weights_E, self.chunk_gradients, self.chunk_entries
        )
        return HeadOutput(nll, labels_E.new_empty(0), loss)

    def _entries(self, hidden_ED: Tensor, labels_E: Tensor) -> HeadOutput:
        """Return losses whose backward pass computes the logits again."""
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
