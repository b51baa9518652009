"""z: the mean squared log-partition, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moelora.losses.z import Z
from tests import tiny

LOSS = Z(1.0)


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(5)]])
    expected = (math.log(2) ** 2 + math.log(8) ** 2) / 2
    assert LOSS(tiny.route(logits, 1), tiny.view((2,))).item() == pytest.approx(expected)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1000.0, 0.0]])
    assert LOSS(tiny.route(logits, 1), tiny.view((1,))).item() == pytest.approx(1e6)


def test_gradient_is_that_of_the_formula() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(LOSS(tiny.route(logits, 2), tiny.view((6,))), logits)
    torch.testing.assert_close(grad, 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) / 6)


def test_padding_changes_nothing() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])
    logits = torch.randn(8, 5)
    alone = LOSS(tiny.route(logits[mask.reshape(-1).bool()], 2), tiny.view((4,)))
    for filler in (0.0, 50.0):
        logits[mask.reshape(-1) == 0] = filler * torch.randn(4, 5)
        torch.testing.assert_close(LOSS(tiny.route(logits, 2), tiny.view((2, 4), mask)), alone)


def test_answers_are_counted_alone() -> None:
    answers, logits = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool(), torch.randn(8, 5)
    view = tiny.view((2, 4), answers={"input": answers}).only("answers")
    alone = LOSS(tiny.route(logits[answers.flatten()], 2), tiny.view((3,)))
    torch.testing.assert_close(LOSS(tiny.route(logits, 2), view), alone)


def test_only_padding_is_zero_with_a_graph() -> None:
    term = LOSS(tiny.route(torch.randn(4, 3, requires_grad=True), 1), tiny.view((1, 4), torch.zeros(1, 4)))
    assert term.item() == 0 and term.requires_grad
