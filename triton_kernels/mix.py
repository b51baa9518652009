"""Gates in rank space, forward and backward.

    blocks   u[t, q, j] = scale[q, j] g[t, q] h[t, q, j]
    shared   u[t, q, j] = scale[q, j] g[t, q] h[t, j]
    pairs    u[t, s, j] = scale[index[t, s], j] g[t, s] h[t, s, j]      (h of chosen units alone)
    core     u[t, i] = scale[i] sum over q of g[t, q] sum over j of core[q, i, j] h[t, j]

Gates are [T, units], or [T, k] with an index of the chosen units. A gate's gradient is an inner product in rank space.
All is float32 inside; what rank space is read and written in is up to the caller.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from moelora.triton_kernels import launch
from moelora.triton_kernels.launch import Config
from torch import Tensor

Form = Literal["blocks", "shared", "pairs"]


@triton.jit
def _gates(weight, index, row, here, q, units, k, INDEXED: tl.constexpr):
    """[rows, units of this tile]."""
    if INDEXED:
        gate = (row[:, None] * 0 + q[None, :] * 0).to(tl.float32)
        for s in range(k):
            chosen = tl.load(index + row * k + s, mask=here, other=-1).to(tl.int32)
            own = tl.load(weight + row * k + s, mask=here, other=0.0).to(tl.float32)
            gate += tl.where(chosen[:, None] == q[None, :], own[:, None], 0.0)
        return gate
    else:
        cells = here[:, None] & (q < units)[None, :]
        return tl.load(weight + row[:, None] * units + q[None, :], mask=cells, other=0.0).to(tl.float32)


@triton.jit
def _scales(scale, index, row, here, q, j, units, width, PAIRS: tl.constexpr):
    if PAIRS:
        inside = here[:, None] & (q < units)[None, :]
        unit = tl.load(index + row[:, None] * units + q[None, :], mask=inside, other=0)
        cells = inside[:, :, None] & (j < width)[None, None, :]
        return tl.load(scale + unit[:, :, None] * width + j[None, None, :], mask=cells, other=0.0).to(tl.float32)
    else:
        return tl.load(
            scale + q[None, :, None] * width + j[None, None, :],
            mask=(q < units)[None, :, None] & (j < width)[None, None, :],
            other=0.0,
        ).to(tl.float32)


@triton.jit
def _mix(
    h, weight, index, scale, u, tokens, units, width, k,
    INDEXED: tl.constexpr, SHARED: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    q = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    j = tl.arange(0, WIDTH)
    here = row < tokens
    cells = here[:, None, None] & (q < units)[None, :, None] & (j < width)[None, None, :]
    gate = _gates(weight, index, row, here, q, units, k, INDEXED)
    factor = _scales(scale, index, row, here, q, j, units, width, PAIRS) * gate[:, :, None]
    cell = row[:, None, None] * (units * width) + (q * width)[None, :, None] + j[None, None, :]
    source = row[:, None, None] * width + (q * 0)[None, :, None] + j[None, None, :] if SHARED else cell
    value = tl.load(h + source, mask=cells, other=0.0).to(tl.float32)
    tl.store(u + cell, (factor * value).to(u.dtype.element_ty), mask=cells)


@triton.jit
def _unmix(
    du, h, weight, index, scale, dh, dweight, tokens, units, width, k,
    INDEXED: tl.constexpr, SHARED: tl.constexpr, PAIRS: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    here = row < tokens
    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    steps = tl.cdiv(units, UNITS) if SHARED else 1
    for step in range(steps):
        q = (step if SHARED else tl.program_id(1)) * UNITS + tl.arange(0, UNITS)
        cells = here[:, None, None] & (q < units)[None, :, None] & (j < width)[None, None, :]
        cell = row[:, None, None] * (units * width) + (q * width)[None, :, None] + j[None, None, :]
        source = row[:, None, None] * width + (q * 0)[None, :, None] + j[None, None, :] if SHARED else cell
        gate = _gates(weight, index, row, here, q, units, k, INDEXED)
        scaled = tl.load(du + cell, mask=cells, other=0.0).to(tl.float32)
        scaled = scaled * _scales(scale, index, row, here, q, j, units, width, PAIRS)
        own = scaled * gate[:, :, None]
        if SHARED:
            total += tl.sum(own, axis=1)
        else:
            tl.store(dh + cell, own.to(dh.dtype.element_ty), mask=cells)
        if GATES:
            value = tl.load(h + source, mask=cells, other=0.0).to(tl.float32)
            inner = tl.sum(scaled * value, axis=2)
            if INDEXED:
                for s in range(k):
                    chosen = tl.load(index + row * k + s, mask=here, other=-1).to(tl.int32)
                    hit = chosen[:, None] == q[None, :]
                    found = tl.sum(tl.where(hit, inner, 0.0), axis=1)
                    tl.store(dweight + row * k + s, found, mask=here & (tl.sum(hit.to(tl.int32), axis=1) > 0))
            else:
                tl.store(dweight + row[:, None] * units + q[None, :], inner, mask=here[:, None] & (q < units)[None, :])
    if SHARED:
        tl.store(
            dh + row[:, None] * width + j[None, :], total.to(dh.dtype.element_ty),
            mask=here[:, None] & (j < width)[None, :],
        )  # fmt: skip


def _tile(units: int, width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    many = max(1, min(triton.next_power_of_2(units), 64 // wide))
    return {"ROWS": max(1, min(64, 2048 // (wide * many))), "UNITS": many, "WIDTH": wide}


def mix(
    h: Tensor, weight: Tensor, index: Tensor | None, scale: Tensor, width: int, form: Form, dtype: torch.dtype
) -> Tensor:
    """u [T, C] in ``dtype``. h: [T, R], or [T, k * width] in pairs. weight: [T, G], or [T, k] with index [T, k]."""
    tokens = h.shape[0]
    columns = h.shape[1] if form == "pairs" else scale.shape[0]
    units = columns // width
    indexed = index is not None and form != "pairs"
    u = torch.empty(tokens, columns, dtype=dtype, device=h.device)
    tile = _tile(units, width)
    launch.start(
        _mix,
        (triton.cdiv(tokens, tile["ROWS"]), triton.cdiv(units, tile["UNITS"])),
        (h, weight, index, scale, u, tokens, units, width, weight.shape[1]),
        Config(warps=4, stages=1),
        INDEXED=indexed, SHARED=form == "shared", PAIRS=form == "pairs", **tile,
    )  # fmt: skip
    return u


def unmix(
    du: Tensor, h: Tensor, weight: Tensor, index: Tensor | None, scale: Tensor, width: int, form: Form, need_gates: bool
) -> tuple[Tensor, Tensor | None]:
    """dh as h, float32, and the gates' gradient as weight, float32, from du [T, C]."""
    tokens, columns = du.shape
    units = columns // width
    indexed = index is not None and form != "pairs"
    dh = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=h.device) if need_gates else None
    tile = _tile(units, width)
    second = 1 if form == "shared" else triton.cdiv(units, tile["UNITS"])
    launch.start(
        _unmix,
        (triton.cdiv(tokens, tile["ROWS"]), second),
        (du, h, weight, index, scale, dh, dweight, tokens, units, width, weight.shape[1]),
        Config(warps=4, stages=1),
        INDEXED=indexed, SHARED=form == "shared", PAIRS=form == "pairs", GATES=need_gates, **tile,
    )  # fmt: skip
    return dh, dweight
