"""Ask layers: every entry reads the visible tail by content, so that focus can depend on the
question.

A layer that reaches what is *open* reads all visible tokens of the working context instead, tail
and opened blocks alike: what focus has opened can then name what to open next. Opened blocks
count the more, the more the layers before would keep them open (`standing`); a learned relevance
of each token comes on top.

Queries and keys have no rotary positions and are RMS-normed; there is one wide head, because the
noise of a match falls as 1/sqrt(width). A sink with value zero and a learned logit takes the
mass that matches nothing: it starts at ln(visible tail) + 0.5, since a zero logit would always
leave almost all mass on the tail. With W_q = W_k at initialisation, lexical overlap with the
question is visible from the first step, and is learned away from where it is wrong.

Legend: R rows, M visible entries, Q entries that are read, I width of LensNet.
Source: docs/lensnet-pairwise-training.md, "LensNet".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRUST = 3.0
"""Factor of the standing in the logits, at the start: an opened block that is two deviations
behind the best counts e^-6 of it.
"""


class AskLayer(nn.Module):
    """Let every entry attend by content to a few entries that it reads, about `num_read` of them,
    and add the result to it.

    With `relevance` each read entry also has a learned part of its logit.
    """

    def __init__(self, *, dim: int, num_read: int, tied: bool, relevance: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        if tied:
            with torch.no_grad():
                self.key.weight.copy_(self.query.weight)
        self.norm = nn.RMSNorm(dim)
        self.gain = nn.Parameter(torch.ones(1, 1, 1))
        self.sink_logit = nn.Parameter(torch.full((1, 1, 1), math.log(num_read) + 0.5))
        self.relevance = nn.Linear(dim, 1, bias=False) if relevance else None
        self.trust = nn.Parameter(torch.full((1, 1, 1), TRUST)) if relevance else None
        if self.relevance is not None:
            nn.init.zeros_(self.relevance.weight)

    def forward(
        self,
        x_RMI: Tensor,
        read_RQI: Tensor,
        index_RMI: Tensor | None,
        index_read_RQI: Tensor | None,
        standing_RQ: Tensor | None = None,
    ) -> Tensor:
        """Return the updated entries [R, M, I]. Queries and keys are made from index vectors where
        given, else from the entries.

        `standing_RQ` lowers the logits of read entries: 0 for those of the best block, less for
        others, -inf to leave an entry out.
        """
        rows, length, dim = x_RMI.shape
        read = self.norm(read_RQI)
        query = self.query(self.norm(x_RMI) if index_RMI is None else index_RMI)
        key = F.rms_norm(self.key(read if index_read_RQI is None else index_read_RQI), (dim,))
        value = self.value(read)
        query = F.rms_norm(query, (dim,)) * self.gain
        logits = query.to(key.dtype) @ key.transpose(1, 2) * dim**-0.5
        if self.relevance is not None:
            logits = logits + self.relevance(read).transpose(1, 2)
        if standing_RQ is not None and self.trust is not None:
            closed = standing_RQ.isneginf()
            logits = logits + self.trust * standing_RQ.masked_fill(closed, 0)[:, None]
            logits = logits.masked_fill(closed[:, None], -torch.inf)
        sink = self.sink_logit.expand(rows, length, 1)
        mass = torch.cat([logits.float(), sink.float()], dim=-1).softmax(dim=-1)[..., :-1]
        return x_RMI + self.out(mass.to(value.dtype) @ value)
