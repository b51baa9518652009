"""Tokens under small factors, read once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moelora.ops.project import _project, project


def make(trained: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Tokens [5, 4] and factors of 3 and 2 rows; the second is never trained."""
    torch.manual_seed(0)
    x, first, second = (torch.randn(rows, 4, dtype=dtype) for rows in (5, 3, 2))
    return x.requires_grad_(), [first.requires_grad_(trained), second]


@pytest.mark.parametrize("trained", [True, False])
def test_gradients(trained: bool) -> None:
    x, weights = make(trained)
    torch.library.opcheck(_project, (x, weights))
    assert torch.autograd.gradcheck(lambda x, first: tuple(project(x, [first, weights[1]])), (x, weights[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x, weights = make(True, dtype)
    parts = project(x, weights)
    for part, weight in zip(parts, weights, strict=True):
        torch.testing.assert_close(part, x.float() @ weight.float().t(), rtol=1e-6, atol=1e-6)


def compiled(x: Tensor, weights: list[Tensor]) -> Tensor:
    torch._dynamo.reset()
    together: Tensor = torch.compile(_project, fullgraph=True, backend="aot_eager")(x, weights)
    return together


@pytest.mark.parametrize("function", [_project, compiled])
@pytest.mark.parametrize("trained", [True, False])
def test_tokens_are_kept_for_the_gradients_of_factors_alone(function: Callable[..., Tensor], trained: bool) -> None:
    x, weights = make(trained)
    kept = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(x, weights)
    assert (x.untyped_storage().data_ptr() in kept) == trained
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ torch.cat(weights))
    assert (weights[0].grad is not None) == trained
