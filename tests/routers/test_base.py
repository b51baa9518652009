"""What routers share: float32 scores and the default initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moelora.routers.base import linear_scores, reset_linear


@pytest.mark.parametrize(
    ("x", "weight", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_scores_are_float32_at_least(x: torch.dtype, weight: torch.dtype, expected: torch.dtype) -> None:
    tokens, w = torch.randn(3, 64).to(x), torch.randn(5, 64).to(weight)
    scores = linear_scores(w, tokens)
    assert scores.dtype == expected
    exact = tokens.double() @ w.double().t()  # computed wide, not rounded afterwards
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


def test_initialisation_is_that_of_a_linear_layer() -> None:
    weight = torch.empty(200, 50)
    reset_linear(weight)
    linear = nn.Linear(50, 200)
    bound = 1 / math.sqrt(50)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.03)
