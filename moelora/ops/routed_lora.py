"""``torch.ops.moelora.routed_lora``: schema, shapes and autograd of the one operator.

Three backends have the same two functions, forward and backward: ``reference``, ``cpu`` and ``cuda``. Which way a call
takes is decided before it, from shapes alone (``moelora.ops.path``), so that the shape of what is kept for backward is
known to a compiler too. Backward is an operator as well, so that a compiler sees two opaque calls.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from moelora.core.errors import MoeloraError
from moelora.core.factors import Factors
from moelora.core.route import Route, dense_gates
from moelora.ops import cpu, cuda, reference
from moelora.ops.path import Machine, Path, Shape, choose
from moelora.ops.project import project

CHOSEN: Final = ("compiled", "sorted", "gather")
"""Paths that compute chosen units alone, and of them keep h."""

USUAL: Final = 4096
"""Tokens by which processes that train together decide what is mapped first. It decides in which order gradients come,
which ZeRO-1 and ZeRO-2 need to be the same in all of them; their own token counts differ."""


def _only_dense(x: Tensor, path: str) -> None:
    if path != "dense":
        raise MoeloraError(f"the path '{path}' is none of {x.device.type} tensors here; see moelora.ops.path")


def _forward(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    width: int,
    onto: Tensor | None = None,
    path: str = "dense",
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [T, O], h); see ``moelora.ops.reference`` for the mathematics and the shapes.

    onto: [T, O], what the update is added to, and whose dtype y has; without it y is the update, in x's dtype.
    path: see ``moelora.ops.path``. ranks: [G] int32, how many of a unit's ranks are in use where not all are; the
    others' rows are zero, and a path may leave them out. h: [T, R], or [T, k * width] where a path computes chosen
    units alone. Without A, x [T, R] is h itself, and the h given back is empty.
    """
    if path == "compiled" and x.device.type == "cpu":
        return cpu.forward(x, A, B, scale, weight, index, core, width, onto)
    if _machine(x, A, B, scale, weight, core, onto) == "cuda":
        return cuda.forward(x, A, B, scale, weight, index, core, width, onto, path, ranks)
    _only_dense(x, path)
    return reference.forward(x, A, B, scale, weight, index, core, width, onto)


routed_lora = torch.library.custom_op("moelora::routed_lora", _forward, mutates_args=())


@routed_lora.register_fake
def _(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    width: int,
    onto: Tensor | None = None,
    path: str = "dense",
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if A is None else (x.shape[0], A.shape[0])
    if A is not None and index is not None and path in CHOSEN and core is None and A.shape[0] == B.shape[1]:
        shape = (x.shape[0], index.shape[1] * width)
    h = x.new_empty(shape, dtype=reference.wide(x.dtype))
    return x.new_empty(x.shape[0], B.shape[0], dtype=x.dtype if onto is None else onto.dtype), h


@torch.library.custom_op("moelora::routed_lora_backward", mutates_args=())
def routed_lora_backward(
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
    path: str = "dense",
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, A, B, weight, core); those not needed come back empty."""
    if path == "compiled" and x.device.type == "cpu":
        return cpu.backward(dy, x, A, B, scale, weight, index, core, h, width, need)
    if _machine(x, A, B, scale, weight, core, dy) == "cuda":
        return cuda.backward(dy, x, A, B, scale, weight, index, core, h, width, need, path, ranks)
    _only_dense(x, path)
    return reference.backward(dy, x, A, B, scale, weight, index, core, h, width, need)


@routed_lora_backward.register_fake
def _(
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
    path: str = "dense",
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        return x.new_empty(tensor.shape, dtype=tensor.dtype) if wanted and tensor is not None else x.new_empty(0)

    return like(x, need[0]), like(A, need[1]), like(B, need[2]), like(weight, need[3]), like(core, need[4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, scale, weight, index, core, width, onto, path, ranks = inputs
    ctx.width, ctx.path, ctx.added = width, path, onto is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # h has no gradient, and zeros for it would be as large as h
    if A is not None and not ctx.needs_input_grad[1]:  # nothing but dA reads x, of which the shape remains
        x = x.new_empty(()).expand(x.shape)
    ctx.save_for_backward(x, A, B, scale, weight, index, core, ranks, output[1])


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:  # y took no part in what is differentiated
        return (None,) * 11
    x, A, B, scale, weight, index, core, ranks, h = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    need = [wanted[0], wanted[1] and A is not None, wanted[2], wanted[4], wanted[6]]
    given = (dy.contiguous(), x, A, B, scale, weight, index, core, h, ctx.width, need, ctx.path, ranks)
    grads = routed_lora_backward(*given)
    dx, dA, dB, dweight, dcore = (grad if asked else None for grad, asked in zip(grads, need, strict=True))
    return dx, dA, dB, None, dweight, None, dcore, None, dy if ctx.added and wanted[8] else None, None, None


routed_lora.register_autograd(_backward, setup_context=_setup_context)


def down(x: Tensor, A: Tensor) -> Tensor:
    """h = x A^T [T, R], float32 at least, for routers that read it; then ``apply`` to it without A."""
    return project(x, [A])[0]


def apply(x: Tensor, factors: Factors, route: Route, onto: Tensor | None = None, path: Path | None = None) -> Tensor:
    """The update [T, O] of tokens x [T, D], in x's dtype; added to ``onto`` [T, O], in its dtype, if that is given.

    path: how it is computed, for tests and measurements; by default what takes least time.
    """
    width = factors.B.shape[1] // route.units
    given = (x, factors.A, factors.B, factors.scale, route.weight, route.index, factors.core, width)
    ranks = factors.ranks if factors.ranks is not None and factors.ranks.shape[0] == route.units else None
    # Where nothing watches, past the dispatcher, which takes as long as the products of one token.
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor
    return (routed_lora if watched else _forward)(*given, onto, path or path_of(*given, onto), ranks)[0]


def path_of(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    width: int,
    onto: Tensor | None = None,
) -> Path:
    """The path of a call: of those that its device and dtypes allow, the one that takes least time."""
    machine = _machine(x, A, B, scale, weight, core, onto)
    if machine == "torch":
        return "dense"
    k = None if index is None else index.shape[1]
    units = weight.shape[1] if index is None else reference.unit_count(B, core, width)
    return choose(_shape(x, A, B, core, units, width, k), machine)


def _shape(x: Tensor, A: Tensor | None, B: Tensor, core: Tensor | None, units: int, width: int, k: int | None) -> Shape:
    form: Literal["blocks", "shared", "core"] = "shared"
    if core is not None:
        form, width = "core", B.shape[1]
    elif B.shape[1] == (x.shape[1] if A is None else A.shape[0]):
        form = "blocks"
    half = x.dtype in (torch.bfloat16, torch.float16)
    return Shape(x.shape[0], x.shape[1], B.shape[0], units, width, k, form, half, A is None)


def _machine(x: Tensor, *others: Tensor | None) -> Machine:
    if x.device.type == "cpu":
        return cpu.machine(x, *others)  # type: ignore[arg-type]
    return cuda.machine(x, *others) if x.device.type == "cuda" else "torch"  # type: ignore[arg-type]


def maps_first(x: Tensor, factors: Factors, k: int | None) -> bool:
    """Whether h = A x is wanted of all tokens, which choose k units (None: all), so that it may come before they do."""
    A, B, scale, core = factors.A, factors.B, factors.scale, factors.core
    machine = _machine(x, A, B, scale, scale.unsqueeze(0), core)
    if A is None or machine == "torch":
        return A is not None
    if k is not None and machine != "cuda":
        return False
    ranks = B.shape[1]
    units = max(1, ranks // 16) if core is None else core.shape[0]
    shape = _shape(x, A, B, core, units, min(16, ranks), k)
    if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
        shape = replace(shape, tokens=USUAL)
    return choose(shape, machine) == "dense"


def apply_each(x: Tensor, factors: Factors, route: Route) -> Tensor:
    """The update of every chosen unit apart, without its gate: [T, k, O] from tokens x [T, D]. Blocks only."""
    assert factors.A is not None and route.index is not None
    tokens, k = route.index.shape
    h = down(x, factors.A).repeat_interleave(k, 0)
    alone = Route(torch.ones_like(route.weight).reshape(-1, 1), route.units, route.index.reshape(-1, 1))
    return apply(h, replace(factors, A=None), alone).view(tokens, k, factors.B.shape[0])


def apply_sum(x: Tensor, factors: Factors, route: Route) -> Tensor:
    """The update [T, O] of x [T, k, D], row j of a token seen by its j-th chosen unit alone. Blocks only."""
    assert factors.A is not None and route.index is not None
    tokens, k, _ = x.shape
    h = down(x.flatten(0, 1), factors.A)
    gate = dense_gates(route.weight.reshape(-1, 1), route.index.reshape(-1, 1), route.units)
    u = (h.unflatten(1, (route.units, -1)) * gate.unsqueeze(-1)).view(tokens, k, h.shape[1]).sum(1)
    everything = Route(torch.ones_like(route.weight[:, :1]).expand(-1, route.units), route.units)
    return apply(u.to(h.dtype), replace(factors, A=None), everything)
