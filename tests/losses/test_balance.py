"""Balance: G * sum f P, by hand."""

from __future__ import annotations

import pytest
import torch

from moelora.core.route import Route
from moelora.core.tape import View
from moelora.losses.balance import Balance
from tests import tiny


def value(route: Route, view: View) -> torch.Tensor:
    return Balance(1.0)(route, view).alone()


def test_by_hand() -> None:
    # Two tokens, three units, one choice each: f = (1, 1, 0) / 2, P = mean of the rows.
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    route = Route(torch.ones(2, 1), 3, torch.tensor([[0], [1]]), probs=probs)
    assert value(route, tiny.view((2,))).item() == pytest.approx(3 * (0.5 * 0.4 + 0.5 * 0.4))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_perfect_balance_scores_k(k: int) -> None:
    # Every token prefers another unit, so that counts and probabilities are both level.
    logits = torch.stack([torch.arange(4.0).roll(shift) for shift in range(4)])
    assert value(tiny.route(logits, k), tiny.view((4,))).item() == pytest.approx(k)


def test_one_favourite_scores_more() -> None:
    logits = torch.tensor([[3.0, 0, 0, 0]]).expand(4, 4)
    assert value(tiny.route(logits, 1), tiny.view((4,))).item() == pytest.approx(4 * logits.softmax(-1)[0, 0].item())


def test_a_dense_route_scores_the_number_of_units() -> None:
    probs = torch.randn(5, 3).softmax(-1)
    assert value(Route(probs, 3, probs=probs), tiny.view((5,))).item() == pytest.approx(3)


def test_gradient_reaches_the_probabilities_only() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    route = tiny.route(logits, 2)
    (grad,) = torch.autograd.grad(value(route, tiny.view((6,))), route.probs)
    share = torch.zeros(6, 4, dtype=torch.float64).scatter(1, route.index, 1.0).mean(0)
    torch.testing.assert_close(grad, (4 * share / 6).expand(6, 4))


def test_padding_changes_nothing() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    logits = torch.randn(8, 5)
    alone = value(tiny.route(logits[mask.reshape(-1).bool()], 2), tiny.view((5,)))
    for filler in (0.0, 50.0):
        logits[mask.reshape(-1) == 0] = filler * torch.randn(3, 5)
        torch.testing.assert_close(value(tiny.route(logits, 2), tiny.view((2, 4), mask)), alone)


def test_answers_are_counted_alone() -> None:
    answers, logits = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool(), torch.randn(8, 5)
    view = tiny.view((2, 4), answers={"input": answers}).only("answers")
    alone = value(tiny.route(logits[answers.flatten()], 2), tiny.view((3,)))
    torch.testing.assert_close(value(tiny.route(logits, 2), view), alone)


def test_only_padding_is_zero_with_a_graph() -> None:
    route = tiny.route(torch.randn(4, 3, requires_grad=True), 1)
    term = value(route, tiny.view((1, 4), torch.zeros(1, 4)))
    assert term.item() == 0 and term.requires_grad
