"""Index vectors: LensNet's own additive memory of what every tree node contains.

Token t has z_t = P(x_t * softplus(gate(x_t))), x_t its RMS-normed embedding and the gate a small
MLP: learned term weights. A gist's index vector is the sum of its children's, at every level, so
that it costs O(1) per token and node at inference.

P may start white: embeddings, those of pretrained models above all, share a few strong
directions, which drown what tells tokens apart. Where the second moment of the text's embeddings
is M, P = G M^(-1/2) with G drawn at random makes all directions equally strong, and what is
frequent in the text weak (the idea of smooth inverse frequency, Arora et al., ICLR 2017, without
a list of words).

Legend: B sequences, T tokens, D width of the backbone, I width of LensNet, K block size, P nodes
of the level below. Source: docs/lensnet-pairwise-training.md, "LensNet".
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHRINKAGE = 0.01
"""Share of the mean eigenvalue that is added to each."""


class IndexNet(nn.Module):
    """Index vectors of tokens and of all tree nodes above them, in float32."""

    GATE_WIDTH = 64

    def __init__(self, *, dim: int, lens_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, lens_dim, bias=False)
        self.gate = nn.Sequential(
            nn.Linear(dim, self.GATE_WIDTH), nn.GELU(), nn.Linear(self.GATE_WIDTH, 1)
        )
        final = self.gate[-1]
        assert isinstance(final, nn.Linear)
        nn.init.zeros_(final.weight)
        nn.init.zeros_(final.bias)

    def second_moment(self, lod0_BTD: Tensor) -> Tensor:
        """Return the sum of x x^T over the RMS-normed embeddings x, float64 [D, D]."""
        x = F.rms_norm(lod0_BTD.float(), (lod0_BTD.size(-1),)).flatten(0, -2)
        return (x.T @ x).double()

    @torch.no_grad()
    def whiten(self, moment_DD: Tensor, tokens: int) -> None:
        """Whiten P for embeddings of second moment M, the mean over `tokens` tokens; the mean
        square of index vectors stays the same.

        M is shrunk towards a multiple of the identity by 1 %, and more the fewer tokens it was
        measured on.
        """
        moment = moment_DD.double().cpu()
        dim = len(moment)
        values, directions = torch.linalg.eigh(moment)
        floor = (SHRINKAGE + dim / tokens) * moment.trace() / dim
        before = self.project.weight.double().cpu()
        after = before @ directions * (values.clamp_min(0) + floor).rsqrt() @ directions.T
        energy = (((w @ moment) * w).sum() for w in (before, after))
        scale = (next(energy) / next(energy)).sqrt()
        self.project.weight.copy_(after * scale)

    def token_vectors(self, lod0_BTD: Tensor) -> Tensor:
        """Return the index vectors of tokens, float32 [B, T, I], from their embeddings. Autocast
        does not lower their precision.
        """
        device, whole = lod0_BTD.device.type, self.project.weight.dtype == torch.float32
        with (
            torch.autocast(device, enabled=False)
            if whole and torch.amp.is_autocast_available(device)
            else nullcontext()
        ):
            x = F.rms_norm(lod0_BTD.float(), (lod0_BTD.size(-1),))
            return self.project(x * F.softplus(self.gate(x).float())).float()

    def forward(self, lod0_BTD: Tensor, *, block_size: int, max_lod: int) -> Tensor:
        """Return the index vectors of the whole node table, float32 [B, T + T//K + ..., I]."""
        levels = [self.token_vectors(lod0_BTD)]
        for _ in range(max_lod):
            levels.append(sum_children(levels[-1], block_size))
        return torch.cat(levels, dim=1)


def sum_children(nodes_BPI: Tensor, block_size: int) -> Tensor:
    """Add up each whole block of K nodes: [B, P, I] to [B, P//K, I]. Incomplete blocks at the
    end are left out.
    """
    batch, below, width = nodes_BPI.shape
    count = below // block_size
    return nodes_BPI[:, : count * block_size].reshape(batch, count, block_size, width).sum(dim=2)
