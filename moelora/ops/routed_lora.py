"""``torch.ops.moelora.routed_lora``: schema, shapes and autograd of the one operator.

Backends are kernels of this operator for a device (``routed_lora.register_kernel``); PyTorch's dispatcher picks.
Backward is an operator too, so that a compiler sees two opaque calls and a backend can replace either.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moelora.core.factors import Factors
from moelora.core.route import Route, dense_gates
from moelora.ops import reference


@torch.library.custom_op("moelora::routed_lora", mutates_args=())
def routed_lora(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """(delta [T, O], h [T, R]); see ``moelora.ops.reference`` for the mathematics and the shapes.

    Without A, x [T, R] is h itself, and the h given back is empty.
    """
    return reference.forward(x, A, B, scale, weight, index, core, width)


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
) -> tuple[Tensor, Tensor]:
    shape = (0,) if A is None else (x.shape[0], A.shape[0])
    h = x.new_empty(shape, dtype=reference.compute_dtype(x))
    return x.new_empty(x.shape[0], B.shape[0]), h


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, A, B, weight, core); those not needed come back empty."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        return x.new_empty(tensor.shape, dtype=tensor.dtype) if wanted and tensor is not None else x.new_empty(0)

    return like(x, need[0]), like(A, need[1]), like(B, need[2]), like(weight, need[3]), like(core, need[4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, scale, weight, index, core, width = inputs
    ctx.width = width
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, A, B, scale, weight, index, core, output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, A, B, scale, weight, index, core, h = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    need = [wanted[0], wanted[1] and A is not None, wanted[2], wanted[4], wanted[6]]
    grads = routed_lora_backward(dy.contiguous(), x, A, B, scale, weight, index, core, h, ctx.width, need)
    dx, dA, dB, dweight, dcore = (grad if asked else None for grad, asked in zip(grads, need, strict=True))
    return dx, dA, dB, None, dweight, None, dcore, None


routed_lora.register_autograd(_backward, setup_context=_setup_context)


def down(x: Tensor, A: Tensor) -> Tensor:
    """h = x A^T [T, R] in the operator's dtype, for routers that read it; then ``apply`` to it without A."""
    dtype = reference.compute_dtype(x)
    return x.to(dtype) @ A.to(dtype).t()


def apply(x: Tensor, factors: Factors, route: Route) -> Tensor:
    """The update [T, O] of tokens x [T, D], in x's dtype."""
    width = factors.B.shape[1] // route.units
    return routed_lora(x, factors.A, factors.B, factors.scale, route.weight, route.index, factors.core, width)[0]


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
