"""Bilevel gradients: of a loss that comes after some training, in what the training depended on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
Loss = Callable[[Params, Tensor, Any], Tensor]
"""loss(theta, omega, batch), a scalar."""


def unrolled(
    loss: Loss,
    theta: Params,
    alpha: Tensor,
    omega: Callable[[Tensor], Tensor],
    train: Sequence[Any],
    held_out: Sequence[Any],
    rate: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """Parameters after a step of SGD on each of the training batches, and the gradient of the held-out loss in alpha.

        theta_{j+1} = theta_j - rate d loss(theta_j, omega(alpha), train_j) / d theta_j,        j < K = len(train)
        gradient    = d/dalpha  mean over held_out of loss(theta_K(alpha), omega(alpha), batch)

    theta_K depends on alpha through every step. Without training batches (K = 0) it does not: the first-order form. One
    held-out batch after the other is differentiated, so the graph of the steps is the only large one that is kept.
    """
    alpha = alpha.detach().requires_grad_()
    weights = omega(alpha)
    moved = {name: value.detach().requires_grad_() for name, value in theta.items()}
    for batch in train:
        slopes = torch.autograd.grad(
            loss(moved, weights, batch), list(moved.values()), create_graph=True, materialize_grads=True
        )
        moved = {name: value - rate * slope for (name, value), slope in zip(moved.items(), slopes, strict=True)}
    ends = {name: value.detach().requires_grad_(bool(train)) for name, value in moved.items()}
    seen = weights.detach().requires_grad_()
    inner = [*ends.values(), seen] if train else [seen]
    total = [torch.zeros_like(value) for value in inner]
    for batch in held_out:
        slopes = torch.autograd.grad(loss(ends, seen, batch) / len(held_out), inner, materialize_grads=True)
        total = [value + slope for value, slope in zip(total, slopes, strict=True)]
    outer = [*moved.values(), weights] if train else [weights]
    (gradient,) = torch.autograd.grad(outer, alpha, total)
    return {name: value.detach() for name, value in moved.items()}, gradient
