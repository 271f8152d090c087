"""Matches by meaning: how the tokens of a block answer to single tokens of the visible tail.

Two words of similar meaning have similar embeddings, but the pooled index vectors of a block and of
a question hide a single word. So every token of the tail is compared with every token of a block,
as in late interaction (Khattab and Zaharia, SIGIR 2020). With the white index vectors z of tokens
(`index`) and a learned matrix A, initially the identity, tail token q has in block n the match

    m_nq = max over the block's tokens k of cos(A z_k, A z_q),

standardised over the blocks: what all blocks match alike says nothing. Equal tokens are left out,
since the lexical matches count them. The logarithm of a learned weight of each tail token, which
depends on the token, on the one before it and on the distance to the end, is added to its matches.

Features of a block are the largest of these sums, their log-sum-exp, and the largest over the last
few tokens of the tail. Maxima are taken with `max`, whose gradient goes to an index. That of `amax`
goes to all values that equal the maximum, divided by their number: 0 / 0, should a compiled
backward pass compute the values again with another rounding.

Legend: B sequences, m blocks, K block size, Q last tokens of the tail, I width of LensNet, F
features. Source: docs/experiments/meaning.md.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_ds.model.lensnet.matches import number_of

REACH = 256
"""Largest number of last tokens of the tail that are compared."""
LARGEST = 3
"""Number of largest matches of a block that are features."""
NEAREST = (16, 48)
"""Numbers of last tokens whose largest match is a feature."""
NAMES = (
    *(f"largest_{rank}" for rank in range(1, LARGEST + 1)),
    "all",
    *(f"last_{count}" for count in NEAREST),
)
ROUNDING = 1e-6
"""Is added to the variance over blocks, so that equal matches of all blocks stay 0."""
OPPOSITE = -1.0
"""Smallest cosine: the match of a block all of whose tokens are left out."""


class Compared(NamedTuple):
    """Tokens that are compared, with their index vectors."""

    ids: Tensor
    """[B, m, K] of blocks, or [B, Q] of a tail."""
    vectors: Tensor
    """[.., I]."""


class MeaningFeatures(nn.Module):
    """Computes the features NAMES of blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.transform.weight)
        self.weight = nn.Linear(2 * width, 1, bias=False)
        nn.init.zeros_(self.weight.weight)
        self.distance_weight = nn.Parameter(torch.zeros(REACH))

    def forward(self, blocks: Compared, tail: Compared, count: Tensor | None = None) -> Tensor:
        """Return the features of blocks for the last REACH tokens of a tail, float32 [B, m, F].

        If given, only the first `count` ([1] int64) blocks are not padding; the features of padding
        are 0.
        """
        tail = Compared(tail.ids[:, -REACH:], tail.vectors[:, -REACH:])
        match_BmQ, is_block = _standardised(self._matches(blocks, tail), count)
        weighted = match_BmQ + self._log_weights(tail.vectors)[:, None]
        ranked = weighted.topk(min(LARGEST, weighted.size(-1))).values
        features = [
            *(ranked[..., min(rank, ranked.size(-1) - 1)] for rank in range(LARGEST)),
            weighted.logsumexp(-1),
            *(weighted[..., -last:].max(-1).values for last in NEAREST),
        ]
        return torch.stack(features, dim=-1) * is_block

    def _matches(self, blocks: Compared, tail: Compared) -> Tensor:
        """Return the best match of each token of the tail in each block, float32 [B, m, Q]."""
        keys, queries = (
            F.normalize(self.transform(tokens.vectors), dim=-1) for tokens in (blocks, tail)
        )
        cosines = keys.flatten(1, 2) @ queries.transpose(1, 2)
        equal = blocks.ids[..., None] == tail.ids[:, None, None]
        return cosines.view(equal.shape).masked_fill(equal, OPPOSITE).max(2).values.float()

    def _log_weights(self, tail_BQI: Tensor) -> Tensor:
        """Return the logarithms of the weights of the tail's tokens, float32 [B, Q]."""
        normed = F.rms_norm(tail_BQI, (tail_BQI.size(-1),))
        before = F.pad(normed[:, :-1], (0, 0, 1, 0))
        by_token = self.weight(torch.cat([normed, before], dim=-1)).squeeze(-1)
        return by_token.float() + self.distance_weight[-tail_BQI.size(1) :]


def _standardised(match_BmQ: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each token's matches minus their mean over the blocks, in standard deviations; and
    which blocks are not padding, 1 or 0, [m, 1].
    """
    number = number_of(match_BmQ, count)
    places = torch.arange(match_BmQ.size(1), device=match_BmQ.device)
    is_block = (places < number).to(match_BmQ.dtype)[:, None]
    centred = (match_BmQ - (match_BmQ * is_block).sum(1, keepdim=True) / number) * is_block
    variance = centred.square().sum(1, keepdim=True) / number
    return centred * (variance + ROUNDING).rsqrt(), is_block
