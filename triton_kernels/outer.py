"""Gradients of factors over ragged segments.

    out[unit * width + j, d] = sum over the unit's pairs of u[pair, j] x[row, d]

A program owns its piece of the result and passes over its unit's pairs in their order, so sums never depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from moelora.triton_kernels import launch
from moelora.triton_kernels.launch import Config
from moelora.triton_kernels.sort import Segments
from torch import Tensor


@triton.jit
def _outer(
    u, x, out, order, starts, ranks, tokens, features, width, units, slots, x_row, x_column, out_row, out_column,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    unit, begin = tl.program_id(0), tl.program_id(2) * ROWS
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    j = begin + tl.arange(0, ROWS)
    live = width
    if RANKS:
        live = tl.load(ranks + unit)
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if begin < live:
        for slot in range(slots):
            first = tl.load(starts + slot * (units + 1) + unit)
            last = tl.load(starts + slot * (units + 1) + unit + 1)
            for step in range(first, last, DEPTH):
                pair = step + tl.arange(0, DEPTH)
                here = pair < last
                row = tl.load(order + tl.cast(slot, tl.int64) * tokens + pair, mask=here, other=0).to(tl.int64)
                left = tl.load(
                    u + (row * slots + slot)[None, :] * width + j[:, None],
                    mask=here[None, :] & (j < live)[:, None],
                    other=0.0,
                )
                right = tl.load(
                    x + row[:, None] * x_row + column[None, :] * x_column,
                    mask=here[:, None] & (column < features)[None, :],
                    other=0.0,
                )
                sums = tl.dot(left.to(right.dtype), right, sums, input_precision=PRECISION)
    tl.store(
        out + (unit * width + j).to(tl.int64)[:, None] * out_row + column[None, :] * out_column,
        sums.to(out.dtype.element_ty),
        mask=(j < width)[:, None] & (column < features)[None, :],
    )


def outer_sorted(
    u: Tensor, x: Tensor, out: Tensor, width: int, segments: Segments, config: Config, ranks: Tensor | None = None
) -> Tensor:
    """Fill out [G * width, D], of any strides, from u [T * k, width] in pairs and x [T, D]; units of nobody get 0."""
    (slots, tokens), features, units = segments.order.shape, x.shape[1], out.shape[0] // width
    rows = min(launch.padded(width), config.rows)
    launch.start(
        _outer,
        (units, triton.cdiv(features, config.columns), triton.cdiv(width, rows)),
        (
            u, x, out, segments.order, segments.starts, ranks, tokens, features, width, units, slots, *x.stride(),
            *out.stride(),
        ),
        config,
        RANKS=ranks is not None, ROWS=rows, COLUMNS=config.columns, DEPTH=config.depth, PRECISION=launch.precision(x),
    )  # fmt: skip
    return out
