"""Linear maps with FP8 matrix products, for the projections of decoder blocks in training.

Every tensor gets one scale, so that its largest magnitude becomes the format's largest number:
activations and weights in e4m3 (4 bits of exponent, 3 of mantissa), gradients in e5m2 (Micikevicius
et al., arXiv:2209.05433). Products add up in float32. Weights, their gradients and all between the
products keep their precision.

A value that is not finite makes the whole result not finite, so that the step is skipped.

Legend: N tokens, I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FORWARD = torch.float8_e4m3fn
"""Format of activations and weights."""
BACKWARD = torch.float8_e5m2
"""Format of gradients."""
SMALLEST = 1e-12
"""Smaller largest magnitudes are treated as this, so that the scale is finite."""


def linear(x: Tensor, weight_OI: Tensor, *, fp8: bool) -> Tensor:
    """Compute `F.linear` without bias, [..., I] -> [..., O]; in FP8 if asked to.

    FP8 needs a GPU of compute capability 8.9 or above, or a CPU (slow), and N, I and O that are
    multiples of 16.
    """
    if not fp8:
        return F.linear(x, weight_OI)
    found: Tensor = _Linear.apply(x.flatten(0, -2), weight_OI)
    return found.unflatten(0, x.shape[:-1])


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `x` scaled and rounded to `dtype`, and what to multiply it by to get `x` (0-d)."""
    scale = torch.finfo(dtype).max / x.abs().amax().float().clamp_min(SMALLEST)
    return (x.float() * scale).to(dtype), scale.reciprocal()


def _product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """Return a @ b. `a` must be contiguous in its rows and `b` in its columns.

    `fast` adds up in the tensor cores' own accumulator, which has fewer than 24 bits on Hopper.
    """
    return torch._scaled_mm(
        a[0], b[0], scale_a=a[1], scale_b=b[1], out_dtype=dtype, use_fast_accum=fast
    )


class _Linear(torch.autograd.Function):
    """The product and its two gradients. It keeps the rounded input, and rounds the weight again in
    the backward pass, because under ZeRO-3 the weight is only there while its block runs.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        """Return x @ weight^T, [N, O]."""
        x, scale = to_fp8(x_NI, FORWARD)
        weight, weight_scale = to_fp8(weight_OI, FORWARD)
        ctx.save_for_backward(x, scale, weight_OI)
        ctx.dtype = x_NI.dtype
        return _product((x, scale), (weight.t(), weight_scale), x_NI.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of input and weight."""
        x_NI, scale, weight_OI = ctx.saved_tensors
        gradient, gradient_scale = to_fp8(gradient_NO, BACKWARD)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            weight, weight_scale = to_fp8(weight_OI, FORWARD)
            by_columns = (_by_columns(weight), weight_scale)
            of_x = _product((gradient, gradient_scale), by_columns, ctx.dtype, fast=False)
        if ctx.needs_input_grad[1]:
            by_rows = (gradient.t().contiguous(), gradient_scale)
            by_columns = (_by_columns(x_NI), scale)
            of_weight = _product(by_rows, by_columns, weight_OI.dtype, fast=False)
        return of_x, of_weight


def _by_columns(x: Tensor) -> Tensor:
    """Return `x` stored column by column."""
    return x.t().contiguous().t()
