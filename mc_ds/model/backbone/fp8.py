"""Linear maps with FP8 matrix products, for the projections of decoder blocks in training.

Every tensor gets one scale, so that its largest magnitude becomes the format's largest number:
activations and weights in e4m3 (4 bits of exponent, 3 of mantissa), gradients in e5m2 (Micikevicius
et al., arXiv:2209.05433). Products add up in float32. Weights, their gradients and all between the
products keep their precision.

A value that is not finite makes the whole result not finite, so that the step is skipped.

Legend: N tokens, I inputs, O outputs.
"""

from typing import Any, NamedTuple

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


class Scaled(NamedTuple):
    """A matrix in FP8."""

    values: Tensor
    inverse: Tensor
    """What to multiply `values` by to get the matrix, float32 (0-d)."""


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale with which the largest magnitude becomes `dtype`'s largest number (0-d)."""
    return torch.finfo(dtype).max / x.abs().amax().float().clamp_min(SMALLEST)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Scaled:
    """Return `x` rounded to `dtype`, with its layout."""
    return Scaled((x.float() * scale).to(dtype), scale.reciprocal())


def transposed(x: Scaled) -> Scaled:
    """Return the transpose of `x`, contiguous."""
    return x._replace(values=x.values.t().contiguous())


def product(a: Scaled, b_transposed: Scaled, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """Return a @ b from a and the transpose of b, both contiguous.

    `fast` adds up in the tensor cores' own accumulator, which has fewer than 24 bits on Hopper.
    """
    return torch._scaled_mm(
        a.values,
        b_transposed.values.t(),
        scale_a=a.inverse,
        scale_b=b_transposed.inverse,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


class _Linear(torch.autograd.Function):
    """The product and its two gradients. It keeps the rounded input, and rounds the weight again in
    the backward pass, because under ZeRO-3 the weight is only there while its block runs.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        """Return x @ weight^T, [N, O]."""
        x = rounded(x_NI, scale_of(x_NI, FORWARD), FORWARD)
        weight_scale = scale_of(weight_OI, FORWARD)
        ctx.save_for_backward(*x, weight_OI, weight_scale)
        ctx.dtype = x_NI.dtype
        return product(x, rounded(weight_OI, weight_scale, FORWARD), x_NI.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of input and weight."""
        *x, weight_OI, weight_scale = ctx.saved_tensors
        gradient = rounded(gradient_NO, scale_of(gradient_NO, BACKWARD), BACKWARD)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            weight = rounded(weight_OI, weight_scale, FORWARD)
            of_x = product(gradient, transposed(weight), ctx.dtype, fast=False)
        if ctx.needs_input_grad[1]:
            crosswise = transposed(gradient), transposed(Scaled(*x))
            of_weight = product(*crosswise, weight_OI.dtype, fast=False)
        return of_x, of_weight
