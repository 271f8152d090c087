"""The Triton kernel of `fp8_cast`. Import it only where Triton is installed."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def cast_kernel(
    x: Any,
    scale: Any,
    straight: Any,
    transposed: Any,
    rows: Any,
    columns: Any,
    STRAIGHT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Round one tile of x [rows, columns], and store it as it is, transposed, or both."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    rounded = value.to(straight.dtype.element_ty)
    if STRAIGHT:
        tl.store(straight + place, rounded, mask=inside)
    if TRANSPOSED:
        place = column.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(transposed + place, tl.trans(rounded), mask=tl.trans(inside))
