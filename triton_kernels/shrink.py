"""Products with few columns: x [T, D] to rank space, and router scores from the same read of x.

    out[row, j] = sum over d of x[row, d] w[unit * width + j, d]

Also the gradient of rank space, with dy and B in the place of x and w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moelora.triton_kernels import launch
from moelora.triton_kernels.launch import Config
from moelora.triton_kernels.sort import Segments
from torch import Tensor


@triton.jit
def _shrink(
    x, w, out, gate, order, tile_unit, tile_first, starts, ranks, tokens, features, width, gates, units, slots,
    x_row, x_column, w_row, w_column, gate_row, gate_column, out_row,
    SORTED: tl.constexpr, RANKS: tl.constexpr, SCORES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GATES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, begin = tl.program_id(0), tl.program_id(1) * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    unit, live = 0, width
    if SORTED:
        tiles = tl.num_programs(0) // slots
        slot = tile // tiles
        unit = tl.load(tile_unit + tile)
        if unit == units:
            return
        if RANKS:
            live = tl.load(ranks + unit)
        pair = tl.load(tile_first + tile) + tl.arange(0, ROWS)
        here = pair < tl.load(starts + slot * (units + 1) + unit + 1)
        row = tl.load(order + slot.to(tl.int64) * tokens + pair, mask=here, other=0).to(tl.int64)
        to = row * slots + slot
    else:
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        here = row < tokens
        to = row
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if SCORES:
        score = tl.zeros([ROWS, GATES], dtype=tl.float32)
        other = tl.arange(0, GATES)
    w_from = w + (unit * width + column).to(tl.int64)[None, :] * w_row
    for step in range(0, features, DEPTH):
        d = step + depth
        inside = d < features
        left = tl.load(
            x + row[:, None] * x_row + d.to(tl.int64)[None, :] * x_column,
            mask=here[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            w_from + d.to(tl.int64)[:, None] * w_column, mask=inside[:, None] & (column < live)[None, :], other=0.0
        )
        sums = tl.dot(left, right.to(left.dtype), sums, input_precision=PRECISION)
        if SCORES:
            if begin == 0:
                extra = tl.load(
                    gate + other.to(tl.int64)[None, :] * gate_row + d.to(tl.int64)[:, None] * gate_column,
                    mask=inside[:, None] & (other < gates)[None, :],
                    other=0.0,
                )
                score = tl.dot(left, extra.to(left.dtype), score, input_precision=PRECISION)
    tl.store(out + to[:, None] * out_row + column[None, :], sums, mask=here[:, None] & (column < width)[None, :])
    if SCORES:
        if begin == 0:
            tl.store(
                out + row[:, None] * out_row + (width + other)[None, :],
                score,
                mask=here[:, None] & (other < gates)[None, :],
            )


def shrink(x: Tensor, w: Tensor, config: Config, gate: Tensor | None = None) -> Tensor:
    """x [w, gate]^T [T, R + G] float32, from one read of x [T, D]. w: [R, D]. gate: [G, D]."""
    (tokens, features), width = x.shape, w.shape[0]
    second, gates = (w, 0) if gate is None else (gate, gate.shape[0])
    out = torch.empty(tokens, width + gates, dtype=torch.float32, device=x.device)
    columns = min(launch.padded(width), config.columns)
    launch.start(
        _shrink,
        (triton.cdiv(tokens, config.rows), triton.cdiv(width, columns)),
        (
            x, w, out, second, *[None] * 5, tokens, features, width, gates, 1, 1, *x.stride(), *w.stride(),
            *second.stride(), width + gates,
        ),
        config,
        SORTED=False, RANKS=False, SCORES=gate is not None, ROWS=config.rows, COLUMNS=columns,
        GATES=launch.padded(gates), DEPTH=config.depth, PRECISION=launch.precision(x),
    )  # fmt: skip
    return out


def shrink_sorted(
    x: Tensor, w: Tensor, width: int, segments: Segments, config: Config, ranks: Tensor | None = None
) -> Tensor:
    """[T * k, width] float32: token t with its s-th unit in row t * k + s. x: [T, D]. w: [G * width, D].

    ranks: [G] int32, how many of a unit's rows of w are in use; those beyond are not read and come out zero.
    """
    (tokens, features), slots = x.shape, segments.order.shape[0]
    out = torch.empty(tokens * slots, width, dtype=torch.float32, device=x.device)
    columns = min(launch.padded(width), config.columns)
    launch.start(
        _shrink,
        (segments.unit.numel(), triton.cdiv(width, columns)),
        (
            x, w, out, w, segments.order, segments.unit, segments.first, segments.starts, ranks, tokens, features,
            width, 1, w.shape[0] // width, slots, *x.stride(), *w.stride(), *w.stride(), width,
        ),
        config,
        SORTED=True, RANKS=ranks is not None, SCORES=False, ROWS=segments.rows, COLUMNS=columns, GATES=16,
        DEPTH=config.depth, PRECISION=launch.precision(x),
    )  # fmt: skip
    return out
