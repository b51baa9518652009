"""Tokens by the unit they chose: a stable counting sort, one per choice slot, without a word to the host.

Three kernels: count units in chunks of tokens; sum the counts up and lay out the tiles; put every token in its place.
A slot has every token once, so that the pairs of one slot can be added to y without meeting each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from moelora.triton_kernels import launch
from torch import Tensor

CHUNK = 128


@dataclass(frozen=True, slots=True)
class Segments:
    """order: [k, T] int32, tokens sorted by the unit of their slot. starts: [k, G + 1] int32, where each unit's begin.

    unit, first: [k, tiles] int32, the unit of a tile of ``rows`` pairs (G: the tile is empty), and where it begins.
    """

    order: Tensor
    starts: Tensor
    unit: Tensor
    first: Tensor
    rows: int


@triton.jit
def _count(index, counts, tokens, k, units, chunks, CHUNK: tl.constexpr, UNITS: tl.constexpr):
    slot, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    chosen = tl.load(index + token.to(tl.int64) * k + slot, mask=token < tokens, other=-1).to(tl.int32)
    unit = tl.arange(0, UNITS)
    found = tl.sum((chosen[:, None] == unit[None, :]).to(tl.int32), axis=0)
    tl.store(counts + (slot * chunks + chunk) * units + unit, found, mask=unit < units)


@triton.jit
def _lay_out(
    counts, starts, tile_unit, tile_first, units, chunks, tiles, ROWS: tl.constexpr, UNITS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    unit = tl.arange(0, UNITS)
    total = tl.zeros([UNITS], dtype=tl.int32)
    for chunk in range(chunks):
        place = counts + (slot * chunks + chunk) * units + unit
        found = tl.load(place, mask=unit < units, other=0)
        tl.store(place, total, mask=unit < units)
        total += found
    start = tl.cumsum(total, axis=0) - total
    tl.store(starts + slot * (units + 1) + unit, start, mask=unit < units)
    tl.store(starts + slot * (units + 1) + units, tl.sum(total, axis=0))
    needed = (total + ROWS - 1) // ROWS
    ends = tl.cumsum(needed, axis=0)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        before = (ends[None, :] <= tile[:, None]) & (unit < units)[None, :]
        own = tl.sum(before.to(tl.int32), axis=1)
        here = own[:, None] == unit[None, :]
        first = tl.sum(tl.where(here, (start - (ends - needed) * ROWS)[None, :], 0), axis=1) + tile * ROWS
        tl.store(tile_unit + slot * tiles + tile, own, mask=tile < tiles)
        tl.store(tile_first + slot * tiles + tile, first, mask=tile < tiles)


@triton.jit
def _place(index, counts, starts, order, tokens, k, units, chunks, CHUNK: tl.constexpr, UNITS: tl.constexpr):
    slot, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    chosen = tl.load(index + token.to(tl.int64) * k + slot, mask=token < tokens, other=-1).to(tl.int32)
    unit = tl.arange(0, UNITS)
    mine = chosen[:, None] == unit[None, :]
    before = tl.load(counts + (slot * chunks + chunk) * units + unit, mask=unit < units, other=0)
    before += tl.load(starts + slot * (units + 1) + unit, mask=unit < units, other=0)
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1 + before[None, :]
    place = tl.sum(tl.where(mine, rank, 0), axis=1)
    tl.store(order + slot.to(tl.int64) * tokens + place, token, mask=token < tokens)


def sort_tokens(index: Tensor, units: int, rows: int) -> Segments:
    """The segments of ``index`` [T, k] int64 with values below ``units``, in tiles of ``rows`` pairs. k >= 1."""
    tokens, k = index.shape
    index = index.contiguous()
    chunks, tiles = triton.cdiv(tokens, CHUNK), triton.cdiv(tokens, rows) + units
    new = {"dtype": torch.int32, "device": index.device}
    counts, starts = torch.empty(k, chunks, units, **new), torch.empty(k, units + 1, **new)
    unit, first = torch.empty(k, tiles, **new), torch.empty(k, tiles, **new)
    order = torch.empty(k, tokens, **new)
    wide, config = triton.next_power_of_2(units), launch.Config(warps=4, stages=1)
    sizes = {"CHUNK": CHUNK, "UNITS": wide}
    launch.start(_count, (k, chunks), (index, counts, tokens, k, units, chunks), config, **sizes)
    layout = {"ROWS": rows, "UNITS": wide, "TILES": max(1, min(64, 4096 // wide))}
    launch.start(_lay_out, (k,), (counts, starts, unit, first, units, chunks, tiles), config, **layout)
    launch.start(_place, (k, chunks), (index, counts, starts, order, tokens, k, units, chunks), config, **sizes)
    return Segments(order, starts, unit, first, rows)
