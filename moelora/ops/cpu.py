"""The compiled kernels of the operator for CPUs (``csrc/``): loaded when they were built, used where they pay.

The schemas are defined here; the library beside this file only adds their implementation for the device CPU, so that
without it nothing is missing but speed. It computes the chosen units alone, in float32 with float32 sums, for float32
and bfloat16 tensors; everything else stays with ``moelora.ops.reference``.
"""

from __future__ import annotations

import warnings
from enum import IntEnum
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

LIBRARY: Final = Path(__file__).with_name("_cpu.abi3.so")
"""Built by setup.py."""

_ARGUMENTS: Final = (
    "Tensor x, Tensor? A, Tensor B, Tensor scale, Tensor weight, Tensor? index, Tensor? core, {}int width"
)
_SCHEMAS: Final = torch.library.Library("moelora", "FRAGMENT")
_SCHEMAS.define("cpu_forward(" + _ARGUMENTS.format("") + ", Tensor? onto) -> (Tensor, Tensor)")
_SCHEMAS.define(
    "cpu_backward(Tensor dy, " + _ARGUMENTS.format("Tensor h, ") + ", int need)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_SCHEMAS.define("cpu_level(int wanted) -> int")


class Level(IntEnum):
    """The instructions that the kernels use."""

    ABSENT = 0
    PORTABLE = 1
    AVX2 = 2
    AVX512 = 3


def load(path: Path = LIBRARY) -> str:
    """Load the library. What is wrong with it, or an empty string."""
    if not path.is_file():
        return "not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} cannot be loaded: {error.__cause__ or error}"
    return ""


PROBLEM: Final = load()
"""Why there are no compiled kernels, or an empty string."""
if PROBLEM not in ("", "not built"):
    # Built, but for another PyTorch or machine: right results, slowly, is nothing to find out by chance.
    warnings.warn(f"moelora computes on CPUs without its compiled kernels: {PROBLEM}", RuntimeWarning, stacklevel=2)


def level(wanted: Level | None = None) -> Level:
    """The level in use, by default the highest that this machine has. wanted: use this one from now on (for tests);
    one that the machine lacks is not taken."""
    if PROBLEM:
        return Level.ABSENT
    return Level(torch.ops.moelora.cpu_level(-1 if wanted is None else int(wanted)))


HIGHEST: Final = level()
"""The highest level of this machine. A constant, since a compiler that traces a call cannot ask."""


def status() -> str:
    """One line on the kernels, for people."""
    return PROBLEM or {Level.PORTABLE: "portable", Level.AVX2: "AVX2", Level.AVX512: "AVX-512"}[HIGHEST]


def machine(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    core: Tensor | None,
    onto: Tensor | None = None,
) -> Literal["torch", "portable", "vector"]:
    """What can compute these tensors: the kernels at their level, or PyTorch alone."""
    if PROBLEM or scale.dtype != torch.float32 or weight.dtype != torch.float32 or x.shape[0] >= 2**31:
        return "torch"
    for tensor in (x, A, B, core, onto):  # plain loops: when decoding, this takes a good part of the time
        if tensor is not None and tensor.dtype != torch.float32 and tensor.dtype != torch.bfloat16:
            return "torch"
    for tensor in (A, B, core, weight):
        if tensor is not None and 0 in tensor.shape:
            return "torch"
    return "portable" if HIGHEST is Level.PORTABLE else "vector"


def forward(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    width: int,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.forward``; of blocks h [T, k * width] holds the chosen ones alone."""
    y, h = torch.ops.moelora.cpu_forward(x, A, B, scale, weight, index, core, width, onto)
    return y, h


def backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    h: Tensor,
    width: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.backward``."""
    bits = sum(asked << place for place, asked in enumerate(need))
    dx, dA, dB, dweight, dcore = torch.ops.moelora.cpu_backward(dy, x, A, B, scale, weight, index, core, h, width, bits)
    return dx, dA, dB, dweight, dcore
