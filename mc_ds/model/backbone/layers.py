"""The transformer block that decoder, GistNet and LensNet share.

Modules own the weights, and one pure function of tensors, `transformer_block`, does the
computation. So all blocks share compiled code, and attributes that an engine adds to modules or
parameters are never traced.

Weights are initialised inside constructors: `deepspeed.zero.Init` partitions a parameter as soon as
its module's constructor returns, and a later assignment would silently have no effect.

Legend: R rows, W entries, D width, F feed-forward width, H query heads, J key/value heads, C
channels per head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mc_ds.model.backbone.fp8 import linear
from mc_ds.model.positions import rotary_tables, rotate

NON_CAUSAL_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Kernels for non-causal attention: all except cuDNN's, whose backward without a causal mask gave
NaN on Hopper (torch 2.11, cuDNN 9.19) if the number of keys was 64 more than a multiple of 128 and
all logits of a query were far below zero. Source: docs/experiments/README.md, F4;
pytorch/pytorch#196678.
"""


class BlockWeights(NamedTuple):
    """Weights of one block."""

    attention_norm: Tensor
    """[D]."""
    qkv: Tensor
    """[(H + 2 J) * C, D]: queries, keys, values."""
    out: Tensor
    """[D, H * C]."""
    ffn_norm: Tensor
    """[D]."""
    gate_up: Tensor
    """[2 F, D]: gate, up."""
    down: Tensor
    """[D, F]."""


class BlockShape(NamedTuple):
    """Settings of a block that cannot be derived from the shapes of its weights."""

    num_heads: int
    num_kv_heads: int
    causal: bool
    norm_eps: float
    fp8: bool = False
    """Whether the four projections are computed in FP8; see `mc_ds.model.backbone.fp8`."""


def attention(
    x_RWD: Tensor,
    cos: Tensor,
    sin: Tensor,
    qkv: Tensor,
    out: Tensor,
    shape: BlockShape,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute grouped-query self-attention with rotary positions, [R, W, D] -> [R, W, D]; tables
    are [R or 1, W, C/2]. Without causality, a mask that broadcasts to [R, H, W, W] is added to the
    logits.
    """
    rows, length, _ = x_RWD.shape
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    projected = linear(x_RWD, qkv, fp8=shape.fp8).view(rows, length, heads + 2 * kv_heads, -1)
    projected = projected.transpose(1, 2)
    q_RHWC, k_RJWC, v_RJWC = projected.split([heads, kv_heads, kv_heads], dim=1)
    q_RHWC, k_RJWC = rotate(q_RHWC, cos, sin), rotate(k_RJWC, cos, sin)
    k_RJWC, v_RJWC = for_fused_kernels(k_RJWC, v_RJWC, heads)
    grouped = k_RJWC.size(1) != heads
    if shape.causal:
        mixed = F.scaled_dot_product_attention(
            q_RHWC, k_RJWC, v_RJWC, is_causal=True, enable_gqa=grouped
        )
    else:
        with sdpa_kernel(NON_CAUSAL_KERNELS):
            mixed = F.scaled_dot_product_attention(
                q_RHWC, k_RJWC, v_RJWC, attn_mask=mask, enable_gqa=grouped
            )
    return linear(mixed.transpose(1, 2).reshape(rows, length, -1), out, fp8=shape.fp8)


def for_fused_kernels(k_RJWC: Tensor, v_RJWC: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return keys and values in a form for which there is a kernel that does not store attention
    weights: float32 on a GPU once for every query head, [R, H, W, C], all others as they are.
    """
    if k_RJWC.is_cuda and k_RJWC.dtype == torch.float32 and k_RJWC.size(1) != heads:
        copies = heads // k_RJWC.size(1)
        return k_RJWC.repeat_interleave(copies, 1), v_RJWC.repeat_interleave(copies, 1)
    return k_RJWC, v_RJWC


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor, *, fp8: bool = False) -> Tensor:
    """Compute a gated feed-forward layer, [..., D] -> [..., D] (arXiv:2002.05202)."""
    gate, up = linear(x, gate_up, fp8=fp8).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, down, fp8=fp8)


def transformer_block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: BlockWeights,
    shape: BlockShape,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute a pre-norm residual block, attention then feed-forward, [R, W, D] -> [R, W, D].
    `mask`: see `attention`.
    """
    dim = (x.size(-1),)
    normed = F.rms_norm(x, dim, weights.attention_norm, shape.norm_eps)
    x = x + attention(normed, cos, sin, weights.qkv, weights.out, shape, mask)
    normed = F.rms_norm(x, dim, weights.ffn_norm, shape.norm_eps)
    return x + swiglu(normed, weights.gate_up, weights.down, fp8=shape.fp8)


BlockFunction = Callable[[Tensor, Tensor, Tensor, BlockWeights, BlockShape], Tensor]


class Projection(nn.Linear):
    """Bias-free linear map whose initial weights are normally distributed with standard deviation
    `std`.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float) -> None:
        self._std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw the initial weights; called by the base constructor."""
        nn.init.normal_(self.weight, std=self._std)


class TransformerBlock(nn.Module):
    """Weights of one block. Decoder and small networks use different subclasses, because DeepSpeed
    marks leaf modules by class.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_dim: int,
        causal: bool,
        std: float,
        out_std: float,
        norm_eps: float = 1e-5,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.shape = BlockShape(num_heads, num_kv_heads, causal, norm_eps, fp8)
        self.function: BlockFunction = transformer_block
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.qkv = Projection(dim, (num_heads + 2 * num_kv_heads) * head_dim, std=std)
        self.out = Projection(num_heads * head_dim, dim, std=out_std)
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.gate_up = Projection(dim, 2 * ffn_dim, std=std)
        self.down = Projection(ffn_dim, dim, std=out_std)

    def weights(self) -> BlockWeights:
        """Return the block's parameters as tensors."""
        modules = (self.attention_norm, self.qkv, self.out, self.ffn_norm, self.gate_up, self.down)
        return BlockWeights(*(module.weight for module in modules))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map [R, W, D] to [R, W, D]; rotary tables are float32 [R or 1, W, C/2]. Evaluation mode
        never uses the compiled function, since shapes vary there, nor FP8, whose scales would let
        rows and later entries change the result.
        """
        if self.training:
            return self.function(x, cos, sin, self.weights(), self.shape)
        return transformer_block(x, cos, sin, self.weights(), self.shape._replace(fp8=False))


class EncoderBlock(TransformerBlock):
    """One non-causal block of GistNet or LensNet."""

    def __init__(self, dim: int, num_heads: int, *, std: float, out_std: float) -> None:
        super().__init__(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            ffn_dim=ffn_width(dim),
            causal=False,
            std=std,
            out_std=out_std,
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run `TransformerBlock.forward`. A mask is for evaluation mode; see `attention`."""
        if mask is None:
            return super().forward(x, cos, sin)
        return transformer_block(x, cos, sin, self.weights(), self.shape, mask)


def ffn_width(dim: int) -> int:
    """Return the width of a SwiGLU layer with about 8 D^2 parameters: 8/3 D, rounded up to a
    multiple of 64.
    """
    return -(-8 * dim // 3 // 64) * 64


def residual_std(std: float, num_layers: int) -> float:
    """Return the initial standard deviation of projections that write to the residual stream: std /
    sqrt(2 layers).
    """
    return std / (2 * num_layers) ** 0.5


def plain_tables(
    length: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return rotary tables [1, length, C/2] of ordinary positions 0..length-1."""
    positions = torch.arange(length, device=device).unsqueeze(0)
    return rotary_tables(
        torch.zeros_like(positions), positions, block_size=2, head_dim=head_dim, base=base
    )
