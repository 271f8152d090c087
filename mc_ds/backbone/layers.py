"""Transformer parts that decoder, GistNet and LensNet share: initialised projections, attention, feed-forward.

Weights are initialised inside constructors: under `deepspeed.zero.Init` a parameter is partitioned as soon as its module's constructor
returns, and a later assignment would silently do nothing.

Legend: R rows, W entries, D width, H query heads, J key/value heads, C channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_ds.positions import rotary_tables, rotate


class Projection(nn.Linear):
    """Bias-free linear map with normally distributed weights of the given standard deviation."""

    def __init__(self, in_features: int, out_features: int, *, std: float) -> None:
        self._std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draws the weights; called by the base constructor."""
        nn.init.normal_(self.weight, std=self._std)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions given from outside."""

    def __init__(self, *, dim: int, num_heads: int, num_kv_heads: int, causal: bool, std: float, out_std: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.causal = num_heads, num_kv_heads, dim // num_heads, causal
        self.qkv = Projection(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, std=std)
        self.out = Projection(num_heads * self.head_dim, dim, std=out_std)

    def forward(self, x_RWD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[R, W, D] -> [R, W, D]; tables [R or 1, W, C/2]."""
        rows, length, _ = x_RWD.shape
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_RWD).view(rows, length, heads + 2 * kv_heads, self.head_dim).transpose(1, 2)
        q_RHWC, k_RJWC, v_RJWC = qkv.split([heads, kv_heads, kv_heads], dim=1)
        q_RHWC, k_RJWC = rotate(q_RHWC, cos, sin), rotate(k_RJWC, cos, sin)
        mixed = F.scaled_dot_product_attention(q_RHWC, k_RJWC, v_RJWC, is_causal=self.causal, enable_gqa=kv_heads != heads)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, heads * self.head_dim))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv:2002.05202)."""

    def __init__(self, *, dim: int, ffn_dim: int, std: float, out_std: float) -> None:
        super().__init__()
        self.gate_up = Projection(dim, 2 * ffn_dim, std=std)
        self.down = Projection(ffn_dim, dim, std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Pre-norm residual block: attention, then feed-forward. Decoder, gist and lens blocks are separate subclasses.

    Separate, because compiled code is cached per class and DeepSpeed marks leaf modules by class: neither may mix the three.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_dim: int,
        causal: bool,
        norm_eps: float = 1e-5,
        std: float = 0.02,
        out_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, causal=causal, std=std, out_std=out_std)
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.ffn = SwiGLU(dim=dim, ffn_dim=ffn_dim, std=std, out_std=out_std)

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The block's function, [R, W, D] -> [R, W, D]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


def ffn_width(dim: int) -> int:
    """Width of a SwiGLU layer with about 8 D^2 parameters: 8/3 D, rounded up to a multiple of 64."""
    return -(-8 * dim // 3 // 64) * 64


def residual_std(std: float, num_layers: int) -> float:
    """Initial standard deviation of projections that write to the residual stream: std / sqrt(2 layers)."""
    return std / (2 * num_layers) ** 0.5


def identity_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary tables [1, length, C/2] of plain positions 0..length-1."""
    positions = torch.arange(length, device=device).unsqueeze(0)
    return rotary_tables(torch.zeros_like(positions), positions, block_size=2, head_dim=head_dim, base=base)
