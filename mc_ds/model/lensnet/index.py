"""Index vectors: a compact additive description of the content of every tree node, for LensNet.

Token t has z_t = P(x_t * softplus(gate(x_t))), where x_t is its RMS-normed embedding and the gate,
a small MLP, learns term weights. A gist's index vector is the sum of its children's, at every
level, so it costs O(1) per token and node at inference.

P may be initialised white (`whiten`). Embeddings, above all those of pretrained models, share a few
strong directions, which hide the differences between tokens. If M is the second moment of the
text's embeddings, P = G M^(-1/2) makes all directions equally strong and weakens what is frequent
in the text (the idea of smooth inverse frequency, Arora et al., ICLR 2017). G is random, with
orthonormal rows, or columns if those are fewer: it keeps cosines as far as the width allows.

Legend: B sequences, T tokens, D width of the backbone, I width of LensNet, K block size, P nodes of
the level below. Source: docs/lensnet-pairwise-training.md, "LensNet".
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AUTOCAST_DEVICES = tuple(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)
"""Device types with autocast. A constant, because torch 2.11 cannot compile the question."""

SHRINKAGE = 0.01
"""Fraction of the mean eigenvalue that is added to every eigenvalue."""


class IndexNet(nn.Module):
    """Computes index vectors of tokens and of all tree nodes above them, in float32."""

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
        """Whiten P for embeddings of second moment M (`moment_DD`), the mean over `tokens` tokens.
        G is the orthonormal matrix next to P. Keeps the mean square of index vectors.

        M is shrunk towards a multiple of the identity by `SHRINKAGE`, and by more if it was
        measured on few tokens.
        """
        moment = moment_DD.double().cpu()
        dim = len(moment)
        values, directions = torch.linalg.eigh(moment)
        floor = (SHRINKAGE + dim / tokens) * moment.trace() / dim
        # G M^(-1/2) with shrunk eigenvalues, rescaled to the mean square of before.
        before = self.project.weight.double().cpu()
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        drawn = left @ right
        after = drawn @ directions * (values.clamp_min(0) + floor).rsqrt() @ directions.T
        energy = (((w @ moment) * w).sum() for w in (before, after))
        scale = (next(energy) / next(energy)).sqrt()
        self.project.weight.copy_(after * scale)

    def token_vectors(self, lod0_BTD: Tensor) -> Tensor:
        """Return the index vectors of tokens, float32 [B, T, I], from their embeddings. Autocast
        does not affect their precision.
        """
        device, is_float32 = lod0_BTD.device.type, self.project.weight.dtype == torch.float32
        with (
            torch.autocast(device, enabled=False)
            if is_float32 and device in AUTOCAST_DEVICES
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
    """Return the sum over each complete block of K nodes, [B, P, I] -> [B, P//K, I]. An incomplete
    block at the end is ignored.
    """
    batch, below, width = nodes_BPI.shape
    count = below // block_size
    return nodes_BPI[:, : count * block_size].reshape(batch, count, block_size, width).sum(dim=2)
