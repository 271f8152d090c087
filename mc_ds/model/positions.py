"""Gaussian RoPE: rotary tables of working-context entries.

Scheme "order": an entry sits at its place 0..W-1 in the working context, as if it were a token:
nothing depends on the length of the history. Scheme "span": at the mean of its span of tokens,
damped by its width. Entry (l, s) then sits at mu = s + (K^l - 1)/2, and its cos and sin at
frequency w are multiplied by exp(-(sigma w)^2 / 2), the modulus of the expected rotation under a
Gaussian of the span's moments (sigma^2 = (K^(2l) - 1)/12). LOD0 has sigma = 0: ordinary RoPE,
bit for bit. Phases are formed and reduced in float64 (float32 phases are garbage at millions of
tokens) and tables are float32; they are never buffers, which a bf16 engine would cast.

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
) -> tuple[Tensor, Tensor]:
    """Make cosine and sine tables, float32, for the entries (lods, starts) [R, W]: [R, W, C/2],
    or [1, W, C/2] for positions by order, which are the same in all rows.
    """
    exponents = torch.arange(0, head_dim, 2, device=starts.device, dtype=torch.float64) / head_dim
    frequencies = base**-exponents
    if scheme == "order":
        places = torch.arange(starts.size(-1), device=starts.device, dtype=torch.float64)
        phases = places[None, :, None] * frequencies
        return phases.cos().float(), phases.sin().float()
    mean, sigma = moments(lods, starts, block_size)
    phases = mean[..., None] * frequencies
    modulus = torch.exp(-0.5 * (sigma[..., None] * frequencies) ** 2)
    return (phases.cos() * modulus).float(), (phases.sin() * modulus).float()


def rotate(x_RHWC: Tensor, cos_RWC: Tensor, sin_RWC: Tensor) -> Tensor:
    """Rotate channel pairs (c, c + C/2) in float32; return the dtype of `x_RHWC` [R, H, W, C].
    Tables are [R or 1, W, C/2].
    """
    first, second = x_RHWC.float().chunk(2, dim=-1)
    cos, sin = cos_RWC.unsqueeze(1), sin_RWC.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
        x_RHWC.dtype
    )
