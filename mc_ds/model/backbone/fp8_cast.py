"""Rounds a matrix to FP8 as it is and transposed, in one pass over memory.

FP8 products need both factors contiguous along the dimension that they sum over, so a backward pass
needs matrices by rows and by columns. Compilers write each with a kernel of its own, and read the
matrix twice.

Legend: N rows, I columns.
"""

from typing import Any

import torch
from torch import Tensor

TILE = 128
"""Rows and columns that one program of the kernel rounds."""


@torch.library.custom_op("mc_ds::fp8_cast", mutates_args=())
def cast(
    x_NI: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    straight: bool,
    transposed: bool,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x * scale in `dtype`, [N, I] if `straight` and [I, N] if `transposed`, both
    contiguous; [0] instead of one that is not wanted.

    `x_NI` must be contiguous. `after` is not read: a cast that depends on a gradient is made in the
    backward pass, whereas a compiler may make another one early and keep it.
    """
    rounded = (x_NI.float() * scale).to(dtype)
    nothing = rounded.new_empty(0)
    return rounded if straight else nothing, rounded.t().contiguous() if transposed else nothing


@cast.register_fake
def _(
    x_NI: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    straight: bool,
    transposed: bool,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, columns = x_NI.shape
    shapes = (rows, columns) if straight else (0,), (columns, rows) if transposed else (0,)
    first, second = (x_NI.new_empty(shape, dtype=dtype) for shape in shapes)
    return first, second


@cast.register_kernel("cuda")
def cast_on_gpu(
    x_NI: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    straight: bool,
    transposed: bool,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do `cast` with one kernel."""
    from mc_ds.model.backbone.fp8_kernel import cast_kernel

    assert x_NI.is_contiguous(), "the kernel reads rows one after the other"
    rows, columns = x_NI.shape
    first = x_NI.new_empty((rows, columns) if straight else 0, dtype=dtype)
    second = x_NI.new_empty((columns, rows) if transposed else 0, dtype=dtype)
    grid: Any = (-(-rows // TILE), -(-columns // TILE))
    cast_kernel[grid](
        x_NI,
        scale,
        first,
        second,
        rows,
        columns,
        STRAIGHT=straight,
        TRANSPOSED=transposed,
        TILE=TILE,
        num_warps=8,
    )
    return first, second
