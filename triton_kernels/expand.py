"""Products with few terms: rank space to y [T, O], added to what is there.

    y[row, o] = onto[row, o] + sum over j of u[pair, j] w[unit * width + j, o]

Also the gradient of x, with A in the place of w. Sorted, one launch per choice slot: a slot has each token once, so
adding to y needs no atomics; the first slot writes every row anew.
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
def _expand(
    u, w, onto, y, order, tile_unit, tile_first, starts, ranks, tokens, outputs, width, units, slot, slots,
    w_row, w_column, onto_row, onto_column,
    SORTED: tl.constexpr, RANKS: tl.constexpr, ONTO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    unit, live = 0, width
    if SORTED:
        unit = tl.load(tile_unit + slot * tl.num_programs(0) + tile)
        if unit == units:
            return
        if RANKS:
            live = tl.load(ranks + unit)
        pair = tl.load(tile_first + slot * tl.num_programs(0) + tile) + tl.arange(0, ROWS)
        here = pair < tl.load(starts + slot * (units + 1) + unit + 1)
        row = tl.load(order + tl.cast(slot, tl.int64) * tokens + pair, mask=here, other=0).to(tl.int64)
        source = row * slots + slot
    else:
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        here = row < tokens
        source = row
    cells = here[:, None] & (column < outputs)[None, :]
    wide = column.to(tl.int64)
    if ONTO:
        sums = tl.load(onto + row[:, None] * onto_row + wide[None, :] * onto_column, mask=cells, other=0.0).to(
            tl.float32
        )
    else:
        sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for step in range(0, live, DEPTH):
        j = step + tl.arange(0, DEPTH)
        left = tl.load(u + source[:, None] * width + j[None, :], mask=here[:, None] & (j < live)[None, :], other=0.0)
        right = tl.load(
            w + (unit * width + j).to(tl.int64)[:, None] * w_row + wide[None, :] * w_column,
            mask=(j < live)[:, None] & (column < outputs)[None, :],
            other=0.0,
        )
        sums = tl.dot(left, right.to(left.dtype), sums, input_precision=PRECISION)
    tl.store(y + row[:, None] * outputs + wide[None, :], sums.to(y.dtype.element_ty), mask=cells)


def _constants(config: Config, u: Tensor, width: int) -> dict[str, int | str]:
    depth = min(launch.padded(width), config.depth)
    return {"COLUMNS": config.columns, "DEPTH": depth, "PRECISION": launch.precision(u)}


def expand(u: Tensor, w: Tensor, config: Config, onto: Tensor | None = None) -> Tensor:
    """onto + u w [T, O] in u's dtype. u: [T, R], contiguous. w: [R, O]. onto: [T, O], left as it is."""
    (tokens, width), outputs = u.shape, w.shape[1]
    y = torch.empty(tokens, outputs, dtype=u.dtype, device=u.device)
    base = y if onto is None else onto
    launch.start(
        _expand,
        (triton.cdiv(tokens, config.rows), triton.cdiv(outputs, config.columns)),
        (u, w, base, y, *[None] * 5, tokens, outputs, width, 1, 0, 1, *w.stride(), *base.stride()),
        config,
        SORTED=False, RANKS=False, ONTO=onto is not None, ROWS=config.rows, **_constants(config, u, width),
    )  # fmt: skip
    return y


def expand_sorted(
    u: Tensor, w: Tensor, segments: Segments, config: Config, onto: Tensor | None = None, ranks: Tensor | None = None
) -> Tensor:
    """The same, [T, O], for u [T * k, width] in pairs. w: [G * width, O]. ranks: as in ``shrink_sorted``."""
    (slots, tokens), width, outputs = segments.order.shape, u.shape[1], w.shape[1]
    y = torch.empty(tokens, outputs, dtype=u.dtype, device=u.device)
    grid = (segments.unit.shape[1], triton.cdiv(outputs, config.columns))
    for slot in range(slots):
        base = y if slot else onto
        launch.start(
            _expand,
            grid,
            (
                u, w, y if base is None else base, y, segments.order, segments.unit, segments.first, segments.starts,
                ranks, tokens, outputs, width, w.shape[0] // width, slot, slots, *w.stride(),
                *(y if base is None else base).stride(),
            ),
            config,
            SORTED=True, RANKS=ranks is not None, ONTO=base is not None, ROWS=segments.rows,
            **_constants(config, u, width),
        )  # fmt: skip
    return y
