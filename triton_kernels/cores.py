"""Routed cores in rank space, forward and backward: no matrix of a token's own is ever made.

    u[t, i] = scale[i] sum over q of g[t, q] sum over j of core[q, i, j] h[t, j]

Gates are [T, G], or [T, k] with an index of the chosen cores. Products are those of float32, by three short ones each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moelora.triton_kernels import launch
from moelora.triton_kernels.launch import Config
from torch import Tensor

ROWS = 16
SPLITS = 32
"""Pieces that the sum over tokens in a core's gradient is cut into: as many on every machine."""


def _config(ranks: int) -> Config:
    return Config(warps=8 if ranks > 32 else 4, stages=1)


@triton.jit
def _gate(weight, index, row, here, q, units, k, INDEXED: tl.constexpr):
    """[rows] of one core."""
    gate = (row * 0).to(tl.float32)
    if INDEXED:
        for s in range(k):
            chosen = tl.load(index + row * k + s, mask=here, other=-1)
            gate += tl.where(chosen == q, tl.load(weight + row * k + s, mask=here, other=0.0).to(tl.float32), 0.0)
    else:
        gate += tl.load(weight + row * units + q, mask=here, other=0.0).to(tl.float32)
    return gate


@triton.jit
def _mix(
    h, core, weight, index, scale, u, tokens, ranks, units, k,
    INDEXED: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, RANKS)
    here = row < tokens
    cells = here[:, None] & (i < ranks)[None, :]
    square = (i < ranks)[:, None] & (i < ranks)[None, :]
    value = tl.load(h + row[:, None] * ranks + i[None, :], mask=cells, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, RANKS], dtype=tl.float32)
    for q in range(units):
        turned = tl.load(core + q * ranks * ranks + i[None, :] * ranks + i[:, None], mask=square, other=0.0)
        each = tl.dot(value, turned.to(tl.float32), input_precision="tf32x3")
        sums += _gate(weight, index, row, here, q, units, k, INDEXED)[:, None] * each
    sums *= tl.load(scale + i, mask=i < ranks, other=0.0).to(tl.float32)[None, :]
    tl.store(u + row[:, None] * ranks + i[None, :], sums.to(u.dtype.element_ty), mask=cells)


@triton.jit
def _unmix(
    du, h, core, weight, index, scale, dh, dweight, tokens, ranks, units, k,
    INDEXED: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, RANKS)
    here = row < tokens
    cells = here[:, None] & (i < ranks)[None, :]
    square = (i < ranks)[:, None] & (i < ranks)[None, :]
    scaled = tl.load(du + row[:, None] * ranks + i[None, :], mask=cells, other=0.0).to(tl.float32)
    scaled *= tl.load(scale + i, mask=i < ranks, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([ROWS, RANKS], dtype=tl.float32)
    for q in range(units):
        own = tl.load(core + q * ranks * ranks + i[:, None] * ranks + i[None, :], mask=square, other=0.0)
        back = tl.dot(scaled, own.to(tl.float32), input_precision="tf32x3")
        sums += _gate(weight, index, row, here, q, units, k, INDEXED)[:, None] * back
        if GATES:
            value = tl.load(h + row[:, None] * ranks + i[None, :], mask=cells, other=0.0).to(tl.float32)
            inner = tl.sum(back * value, axis=1)
            if INDEXED:
                for s in range(k):
                    chosen = tl.load(index + row * k + s, mask=here, other=-1)
                    tl.store(dweight + row * k + s, inner, mask=here & (chosen == q))
            else:
                tl.store(dweight + row * units + q, inner, mask=here)
    tl.store(dh + row[:, None] * ranks + i[None, :], sums, mask=cells)


@triton.jit
def _core_gradient(
    du, h, weight, index, scale, partial, tokens, ranks, units, k, share,
    INDEXED: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    q, split = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, RANKS)
    square = (i < ranks)[:, None] & (i < ranks)[None, :]
    factor = tl.load(scale + i, mask=i < ranks, other=0.0).to(tl.float32)
    sums = tl.zeros([RANKS, RANKS], dtype=tl.float32)
    last = tl.minimum((split + 1).to(tl.int64) * share, tokens)
    for step in range(split.to(tl.int64) * share, last, ROWS):
        row = step + tl.arange(0, ROWS).to(tl.int64)
        here = row < last
        cells = here[:, None] & (i < ranks)[None, :]
        gate = _gate(weight, index, row, here, q, units, k, INDEXED)
        scaled = tl.load(du + row[:, None] * ranks + i[None, :], mask=cells, other=0.0).to(tl.float32)
        scaled = scaled * factor[None, :] * gate[:, None]
        value = tl.load(h + row[:, None] * ranks + i[None, :], mask=cells, other=0.0).to(tl.float32)
        sums = tl.dot(tl.trans(scaled), value, sums, input_precision="tf32x3")
    to = (split.to(tl.int64) * units + q) * ranks * ranks
    tl.store(partial + to + i[:, None] * ranks + i[None, :], sums, mask=square)


def mix(h: Tensor, core: Tensor, weight: Tensor, index: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """u [T, R] in ``dtype``. h: [T, R]. core: [G, R, R], contiguous. weight: [T, G], or [T, k] with index [T, k]."""
    u = torch.empty(h.shape, dtype=dtype, device=h.device)
    launch.start(
        _mix,
        (triton.cdiv(h.shape[0], ROWS),),
        (h, core, weight, index, scale, u, *h.shape, core.shape[0], weight.shape[1]),
        _config(h.shape[1]),
        INDEXED=index is not None, ROWS=ROWS, RANKS=launch.padded(h.shape[1]),
    )  # fmt: skip
    return u


def unmix(
    du: Tensor, h: Tensor, core: Tensor, weight: Tensor, index: Tensor | None, scale: Tensor, need_gates: bool
) -> tuple[Tensor, Tensor | None]:
    """dh [T, R] and the gates' gradient as weight, both float32."""
    dh = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=h.device) if need_gates else None
    launch.start(
        _unmix,
        (triton.cdiv(h.shape[0], ROWS),),
        (du, h, core, weight, index, scale, dh, dweight, *h.shape, core.shape[0], weight.shape[1]),
        _config(h.shape[1]),
        INDEXED=index is not None, GATES=need_gates, ROWS=ROWS, RANKS=launch.padded(h.shape[1]),
    )  # fmt: skip
    return dh, dweight


def core_gradient(du: Tensor, h: Tensor, units: int, weight: Tensor, index: Tensor | None, scale: Tensor) -> Tensor:
    """[G, R, R] float32, summed over tokens in a fixed order."""
    tokens, ranks = h.shape
    splits = max(1, min(SPLITS, triton.cdiv(tokens, ROWS)))
    share = triton.cdiv(triton.cdiv(tokens, splits), ROWS) * ROWS
    partial = torch.empty(splits, units, ranks, ranks, dtype=torch.float32, device=h.device)
    launch.start(
        _core_gradient,
        (units, splits),
        (du, h, weight, index, scale, partial, tokens, ranks, units, weight.shape[1], share),
        _config(h.shape[1]),
        INDEXED=index is not None, ROWS=ROWS, RANKS=launch.padded(ranks),
    )  # fmt: skip
    return partial.sum(0)
