"""Which way a call of the operator is computed: a pure function of its shapes and the machine.

    dense      all ranks of all units, by plain matrix products
    compiled   CPU: the chosen units alone, by the compiled kernels
    sorted     GPU: tokens sorted by unit, then products over ragged segments, of the chosen units alone
    gather     GPU: a few tokens, each with the factors of its own units

On a GPU the dense way is bound by reading x and y until its ranks are very many, and choosing cannot save that; the
sorted way reads x and y once per choice. So there the ways are compared by bytes and products. On a CPU, products
decide, and the rule is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Path = Literal["dense", "compiled", "sorted", "gather"]

Machine = Literal["torch", "portable", "vector", "cuda"]
"""What computes: PyTorch alone; the compiled kernels, without or with vector instructions; the Triton kernels."""

BANDWIDTH: Final = 3.0e12
"""Bytes a second that an H100 copies."""
PRODUCTS: Final = 480e12
"""Half-precision operations a second in skinny products: 60 % of its best."""
LAUNCH: Final = 5e-6
"""Seconds a kernel takes at least."""


@dataclass(frozen=True, slots=True)
class Shape:
    """T tokens of D features to O features, through G units of so many ranks.

    k: chosen units per token, None for dense gates. form: how ranks are mixed (``moelora.ops.reference``). half: tokens
    in half precision. mapped: whether tokens are h = A x already.
    """

    tokens: int
    inputs: int
    outputs: int
    units: int
    width: int
    k: int | None
    form: Literal["blocks", "shared", "core"] = "blocks"
    half: bool = False
    mapped: bool = False


def choose(shape: Shape, machine: Machine) -> Path:
    """The way that takes least time."""
    if machine == "cuda":
        return _on_gpu(shape)
    return "compiled" if _compiled_pays(shape, machine) else "dense"


def _compiled_pays(s: Shape, machine: Machine) -> bool:
    """Measured on layers of 1024 features, forward and backward."""
    if machine == "torch" or s.tokens == 0:
        return False
    if machine == "portable":
        return s.k is not None and 4 * s.k <= s.units
    if s.k is not None and (2 * s.k <= s.units or (s.width >= 4 and 3 * s.k <= 2 * s.units)):
        return True
    if s.tokens <= 64 and s.units * s.width <= 256:
        return True  # one call in place of six: in decoding it is they that take the time
    if s.form == "core":
        return s.width <= (64 if s.half else 16)
    return s.units * s.width <= (32 if s.half else 16)


def _on_gpu(s: Shape) -> Path:
    if s.k is None or s.form != "blocks" or s.mapped or s.tokens == 0:
        return "dense"
    ways: dict[Path, float] = {"dense": dense_seconds(s), "sorted": sorted_seconds(s)}
    if s.tokens <= 64:
        ways["gather"] = gather_seconds(s)
    return min(ways, key=lambda way: ways[way])


def _product(s: Shape, read: int, ranks: int, features: int) -> float:
    """Seconds of a skinny product over ``read`` bytes, every token with so many ranks."""
    return max(read / BANDWIDTH, 2 * s.tokens * features * ranks / PRODUCTS)


def _weights(s: Shape) -> int:
    return 2 * s.units * s.width * (s.inputs + s.outputs)


def dense_seconds(s: Shape) -> float:
    """Of a forward pass: x is read once, y is read and written once."""
    ranks = s.units * s.width
    down = _product(s, 2 * s.tokens * s.inputs, ranks, s.inputs)
    up = _product(s, 4 * s.tokens * s.outputs, ranks, s.outputs)
    return down + up + _weights(s) / BANDWIDTH + 3 * LAUNCH


def sorted_seconds(s: Shape) -> float:
    """Of a forward pass: x is read, y read and written once per choice, and once more for the router's scores."""
    assert s.k is not None
    ranks = s.k * max(16, s.width)  # products take sixteen ranks at least
    down = _product(s, 2 * (s.k + 1) * s.tokens * s.inputs, ranks, s.inputs)
    up = _product(s, 4 * s.k * s.tokens * s.outputs, ranks, s.outputs)
    return down + up + _weights(s) / BANDWIDTH + (5 + s.k) * LAUNCH


def gather_seconds(s: Shape) -> float:
    """Of a forward pass: factors are read once per token and choice, in steps as small as a row."""
    assert s.k is not None
    moved = 2 * s.tokens * s.k * s.width * (s.inputs + s.outputs) + 6 * s.tokens * (s.inputs + s.outputs)
    return 2 * moved / BANDWIDTH + 2 * LAUNCH
