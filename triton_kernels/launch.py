"""How a kernel is started, and with which block sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Config:
    """Rows, columns and depth of a tile, warps that share it, and loads in flight."""

    rows: int = 64
    columns: int = 64
    depth: int = 64
    warps: int = 4
    stages: int = 3

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], config: Config, **constants: Any) -> None:
    """Run a kernel over a grid; an empty one is nothing to do."""
    if 0 not in grid:
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, wherever the tensors are
            kernel[grid](*arguments, **constants, num_warps=config.warps, num_stages=config.stages)


def padded(ranks: int, least: int = 16) -> int:
    """The tile that holds so many ranks: a power of two, sixteen at least, since matrix products need them."""
    return max(least, triton.next_power_of_2(ranks))


def precision(x: Tensor) -> str:
    """Products of float32 are three short ones each, on tensor cores: near enough to float32's own."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
