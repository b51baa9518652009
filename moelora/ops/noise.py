"""Noise on a layer's weight, as it shows in the layer's output: made anew wherever it is needed, never kept.

    noisy(x, deviation, seed) = x E^T [..., O],   E_ij ~ N(0, deviation_i^2) [O, D], the same for equal seeds

The same seed gives the same E in forward, backward, recomputation, and in every process on the same kind of device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sample(deviation: Tensor, wide: int, seed: int) -> Tensor:
    """E [O, D], float32, on the device of deviation [O]."""
    made = torch.Generator(deviation.device).manual_seed(seed)
    drawn = torch.randn(len(deviation), wide, generator=made, device=deviation.device)
    return drawn.mul_(deviation.float().unsqueeze(1))


class _Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, deviation: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(deviation)
        ctx.seed, ctx.wide = seed, x.shape[-1]
        return x @ sample(deviation, x.shape[-1], seed).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (deviation,) = ctx.saved_tensors
        return grads[0] @ sample(deviation, ctx.wide, ctx.seed).to(grads[0].dtype), None, None


def noisy(x: Tensor, deviation: Tensor, seed: int) -> Tensor:
    """x E^T in x's dtype. No gradient reaches deviation."""
    result: Tensor = _Noisy.apply(x, deviation, seed)
    return result
