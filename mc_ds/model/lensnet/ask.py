"""Ask layers: every entry attends to the visible tail by content, so that focus can depend on the
question.

With `lens_ask_reach` = "open", later layers attend to all tokens of the working context instead,
tail and opened blocks alike, so that an opened block can name what to open next. An opened block
has more weight if the layers before would keep it open (`standing`); each token adds a learned
relevance.

Queries and keys are RMS-normed and have no rotary positions. There is one wide head, since the
noise of a match falls as 1/sqrt(width). A sink with value zero and a learned logit takes the mass
of entries that match nothing; its logit starts at ln(visible tail) + 0.5, because with a zero logit
almost all mass would stay on the tail. W_q = W_k at initialisation makes lexical overlap with the
question visible from the first step; training can unlearn it.

Legend: R rows, M visible entries, Q entries that are attended to, I width of LensNet. Source:
docs/lensnet-pairwise-training.md, "LensNet".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRUST = 3.0
"""Initial factor of the standing in the logits: an opened block two deviations behind the best one
gets e^-6 of its weight.
"""


class AskLayer(nn.Module):
    """Lets every entry attend by content to about `num_read` entries, and adds the result to it.

    With `relevance`, each attended entry adds a learned term to its logit.
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
        """Return the updated entries [R, M, I]. Queries and keys are computed from the index
        vectors if given, else from the entries.

        `standing_RQ` is added to the logits with a learned factor: 0 for entries of the best block,
        negative for others, -inf to exclude an entry.
        """
        rows, length, dim = x_RMI.shape
        read = self.norm(read_RQI)
        query = self.query(self.norm(x_RMI) if index_RMI is None else index_RMI)
        key = F.rms_norm(self.key(read if index_read_RQI is None else index_read_RQI), (dim,))
        value = self.value(read)
        query = F.rms_norm(query, (dim,)) * self.gain
        # Logits [R, M, Q]: match, relevance, standing.
        logits = query.to(key.dtype) @ key.transpose(1, 2) * dim**-0.5
        if self.relevance is not None:
            logits = logits + self.relevance(read).transpose(1, 2)
        if standing_RQ is not None and self.trust is not None:
            excluded = standing_RQ.isneginf()
            logits = logits + self.trust * standing_RQ.masked_fill(excluded, 0)[:, None]
            logits = logits.masked_fill(excluded[:, None], -torch.inf)
        # The sink takes part in the softmax and adds nothing.
        sink = self.sink_logit.expand(rows, length, 1)
        mass = torch.cat([logits.float(), sink.float()], dim=-1).softmax(dim=-1)[..., :-1]
        return x_RMI + self.out(mass.to(value.dtype) @ value)
