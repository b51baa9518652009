"""A few tokens, as in decoding: each reads the factors of its own units and nothing else.

No matrix products here: a token's row times a unit's rows, bound by reading them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moelora.triton_kernels import launch
from moelora.triton_kernels.launch import Config
from torch import Tensor


@triton.jit
def _down(
    x, w, index, h, features, width, k, x_row, x_column, w_row, w_column, RANKS: tl.constexpr, DEPTH: tl.constexpr
):
    token, slot = (tl.program_id(0) // k).to(tl.int64), tl.program_id(0) % k
    j = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    unit = tl.load(index + token * k + slot)
    sums = tl.zeros([RANKS], dtype=tl.float32)
    for step in range(0, features, DEPTH):
        d = (step + tl.arange(0, DEPTH)).to(tl.int64)
        left = tl.load(x + token * x_row + d * x_column, mask=d < features, other=0.0)
        right = tl.load(
            w + (unit * width + j)[:, None] * w_row + d[None, :] * w_column,
            mask=(j < width)[:, None] & (d < features)[None, :],
            other=0.0,
        )
        sums += tl.sum(left.to(tl.float32)[None, :] * right.to(left.dtype).to(tl.float32), axis=1)
    tl.store(h + (token * k + slot) * width + j, sums, mask=j < width)


@triton.jit
def _up(
    u, w, index, onto, y, outputs, width, k, w_row, w_column, onto_row, onto_column,
    ONTO: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    j = tl.arange(0, RANKS)
    sums = tl.zeros([COLUMNS], dtype=tl.float32)
    if ONTO:
        sums += tl.load(onto + token * onto_row + o * onto_column, mask=o < outputs, other=0.0).to(tl.float32)
    for slot in range(k):
        unit = tl.load(index + token * k + slot)
        left = tl.load(u + (token * k + slot) * width + j, mask=j < width, other=0.0)
        right = tl.load(
            w + (unit * width + j)[None, :] * w_row + o[:, None] * w_column,
            mask=(j < width)[None, :] & (o < outputs)[:, None],
            other=0.0,
        )
        sums += tl.sum(left.to(tl.float32)[None, :] * right.to(left.dtype).to(tl.float32), axis=1)
    tl.store(y + token * outputs + o, sums.to(y.dtype.element_ty), mask=o < outputs)


def down(x: Tensor, w: Tensor, index: Tensor, width: int) -> Tensor:
    """h [T, k * width] float32, of the chosen units alone. x: [T, D]. w: [G * width, D]. index: [T, k]."""
    (tokens, features), k = x.shape, index.shape[1]
    h = torch.empty(tokens, k * width, dtype=torch.float32, device=x.device)
    ranks = min(4, triton.next_power_of_2(width))
    launch.start(
        _down,
        (tokens * k, triton.cdiv(width, ranks)),
        (x, w, index, h, features, width, k, *x.stride(), *w.stride()),
        Config(warps=4, stages=2),
        RANKS=ranks, DEPTH=512,
    )  # fmt: skip
    return h


def up(u: Tensor, w: Tensor, index: Tensor, onto: Tensor | None = None) -> Tensor:
    """onto plus the update, [T, O] in u's dtype. u: [T, k * width]. w: [G * width, O]. onto: [T, O]."""
    (tokens, k), outputs = index.shape, w.shape[1]
    width = u.shape[1] // k
    y = torch.empty(tokens, outputs, dtype=u.dtype, device=u.device)
    base, columns = y if onto is None else onto, 32 if width > 32 else 64
    launch.start(
        _up,
        (tokens, triton.cdiv(outputs, columns)),
        (u, w, index, base, y, outputs, width, k, *w.stride(), *base.stride()),
        Config(warps=4, stages=2),
        ONTO=onto is not None, COLUMNS=columns, RANKS=triton.next_power_of_2(width),
    )  # fmt: skip
    return y
