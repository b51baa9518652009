"""``torch.ops.moelora.project``: tokens under one or more small factors, read once.

    project(x, [W1, W2, ...]) = [x W1^T, x W2^T, ...]        [T, N1 + N2 + ...], float32 at least

What a layer wants of its tokens before it routes: h = A x and its router's scores; for layers that read the same
tokens, of all of them. Kept for backward: x and the factors themselves, never a copy in another dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moelora.ops import cuda, reference


@torch.library.custom_op("moelora::project", mutates_args=())
def _project(x: Tensor, weights: list[Tensor]) -> Tensor:
    own = reference.wide(x.dtype)
    if cuda.PROBLEM == "" and x.device.type == "cuda" and x.dtype in (torch.float32, *cuda.HALF) and x.numel():
        return cuda.project(x, weights)
    if x.device.type == "cpu":  # half precision is slow and coarse there
        return x.to(own) @ _stacked(weights, own).t()
    return (x @ _stacked(weights, x.dtype).t()).to(own)


@_project.register_fake
def _(x: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], sum(w.shape[0] for w in weights), dtype=reference.wide(x.dtype))


@torch.library.custom_op("moelora::project_backward", mutates_args=())
def _project_backward(
    dh: Tensor, x: Tensor, weights: list[Tensor], need_x: bool, need: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the needed weights stacked [N, D], in rank space's dtype; empty where not needed."""
    own = reference.wide(x.dtype)
    dtype = own if x.device.type == "cpu" else x.dtype
    dh = dh.to(dtype)
    dx, dw = x.new_empty(0), x.new_empty(0, dtype=own)
    if need_x:
        dx = (dh @ _stacked(weights, dtype)).to(x.dtype)
    if any(need):
        if not all(need):
            parts = dh.split([w.shape[0] for w in weights], 1)
            dh = torch.cat([part for part, asked in zip(parts, need, strict=True) if asked], 1)
        dw = (dh.t() @ x.to(dtype)).to(own)
    return dx, dw


@_project_backward.register_fake
def _(dh: Tensor, x: Tensor, weights: list[Tensor], need_x: bool, need: list[bool]) -> tuple[Tensor, Tensor]:
    rows = sum(w.shape[0] for w, asked in zip(weights, need, strict=True) if asked)
    dx = x.new_empty(x.shape if need_x else (0,))
    return dx, x.new_empty((rows, x.shape[1]) if any(need) else (0,), dtype=reference.wide(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights = inputs
    if not any(weight.requires_grad for weight in weights):  # nothing reads x again, of which the shape remains
        x = x.new_empty(()).expand(x.shape)
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    x, *weights = ctx.saved_tensors
    need_x, asked = ctx.needs_input_grad
    dx, dw = _project_backward(dh.contiguous(), x, weights, need_x, list(asked))
    pieces = iter(dw.split([w.shape[0] for w, a in zip(weights, asked, strict=True) if a]) if any(asked) else ())
    parts = [next(pieces).to(w.dtype) if a else None for w, a in zip(weights, asked, strict=True)]
    return dx if need_x else None, parts


_project.register_autograd(_backward, setup_context=_setup_context)


def _stacked(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    return weights[0].to(dtype) if len(weights) == 1 else torch.cat([w.to(dtype) for w in weights])


def project(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x W^T [T, N] for every W [N, D], from tokens x [T, D]."""
    together = _project(x, weights)
    return [together] if len(weights) == 1 else list(together.split([w.shape[0] for w in weights], 1))


class Image:
    """Tokens x [T, D], and what they are under the factors of one layer: each read of x gives as much as it can.

    first: whether h = A x is wanted of every token whatever they choose, so that it may come with the first scores
        asked for. known: pairs of a factor and x under it.
    """

    def __init__(self, x: Tensor, first: bool = False, known: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self.x, self.first = x, first
        self._A: Tensor | None = None
        self._known = list(known)

    def beside(self, A: Tensor) -> None:
        """Scores asked for from now on come with h = A x."""
        self._A = A

    def under(self, weight: Tensor) -> Tensor:
        """x W^T [T, N], float32 at least."""
        known = self.known(weight)
        if known is not None:
            return known
        A = self._A
        wanted = [weight] if A is None or A is weight or self.known(A) is not None else [A, weight]
        self._known += zip(wanted, project(self.x, wanted), strict=True)
        return self._known[-1][1]

    def known(self, weight: Tensor | None) -> Tensor | None:
        """The same, if it was computed already."""
        return next((value for other, value in self._known if other is weight), None)
