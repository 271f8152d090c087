"""Gaussian RoPE: rotary tables of working-context entries.

Scheme "order" uses an entry's index 0..W-1 in the working context as its position, as if it were a
token, so nothing depends on the length of the history.

Scheme "span" uses the mean of the entry's token span and damps by its width: entry (l, s) is at mu
= s + (K^l - 1)/2, and its cos and sin at frequency w are multiplied by exp(-(sigma w)^2 / 2), the
modulus of the expected rotation under a Gaussian with the span's moments (sigma^2 = (K^(2l) -
1)/12). LOD0 has sigma = 0, which is exactly ordinary RoPE.

Phases are computed and reduced in float64, since float32 phases are useless at millions of tokens.
Tables are float32 and never buffers, which a bf16 engine would cast.

Legend: R rows, W entries, H heads, C channels per head. Sources: RoFormer (arXiv:2104.09864);
docs/model.md, "Gaussian RoPE".
"""

from typing import Literal

import torch
from torch import Tensor

from mc_ds.geometry import moments

Scheme = Literal["span", "order"]


def rotary_tables(
    lods: Tensor,
    starts: Tensor,
    *,
    block_size: int,
    head_dim: int,
    base: float,
    scheme: Scheme = "span",
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine tables, float32 [R, W, C/2] each, of the entries (lods, starts) [R,
    W]. With scheme "order" all rows are equal, and the tables are [1, W, C/2].

    A plan on the host may have tables on another `device`; default: that of the plan. Moments are
    then computed on the host: a GPU takes longer to launch a dozen small kernels.
    """
    device = starts.device if device is None else device
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    frequencies = base**-exponents
    if scheme == "order":
        places = torch.arange(starts.size(-1), device=device)
        phases = places[None, :, None] * frequencies
        return phases.cos().float(), phases.sin().float()
    mean, sigma = moments(lods, starts, block_size)
    mean, sigma = mean.to(device, non_blocking=True), sigma.to(device, non_blocking=True)
    phases = mean[..., None] * frequencies
    modulus = torch.exp(-0.5 * (sigma[..., None] * frequencies) ** 2)
    return (phases.cos() * modulus).float(), (phases.sin() * modulus).float()


def rotate(x_RHWC: Tensor, cos_RWC: Tensor, sin_RWC: Tensor) -> Tensor:
    """Rotate the channel pairs (c, c + C/2) of `x_RHWC` in float32, and return the dtype of the
    input. Tables are [R or 1, W, C/2].
    """
    first, second = x_RHWC.float().chunk(2, dim=-1)
    cos, sin = cos_RWC.unsqueeze(1), sin_RWC.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
        x_RHWC.dtype
    )
