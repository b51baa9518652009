"""entropy: mean token entropy, token by token, in both directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.route import Route
from moelora.losses.entropy import Entropy
from tests import tiny

SHARPEN, FLATTEN = Entropy(1.0), Entropy(1.0, maximise=True)
LOGITS = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(probs: Tensor, tokens: list[int]) -> Tensor:
    """The formula as a loop over tokens and units."""
    total = probs.new_zeros(())
    for t in tokens:
        for p in probs[t]:
            total = total - p * p.log()
    return total / len(tokens)


@pytest.mark.parametrize("loss", [SHARPEN, FLATTEN])
def test_value_and_gradient_are_those_of_the_formula(loss: Entropy) -> None:
    mine, theirs = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    sign = 1 if loss is SHARPEN else -1
    term, expected = loss(tiny.route(mine, 2), tiny.view((8,))), sign * by_hand(theirs.softmax(-1), list(range(8)))
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=1e-12)
    term.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("loss", "sharper"), [(SHARPEN, True), (FLATTEN, False)])
def test_a_step_downhill_goes_the_way_the_option_says(loss: Entropy, sharper: bool) -> None:
    logits = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(tiny.route(logits, 1), tiny.view((8,))), logits)
    before, after = (by_hand(each.softmax(-1), list(range(8))) for each in (LOGITS, LOGITS - 0.1 * grad))
    assert (after < before) == sharper


def test_uniform_is_log_of_the_units_and_one_hot_zero() -> None:
    assert SHARPEN(tiny.route(torch.zeros(3, 5), 1), tiny.view((3,))).item() == pytest.approx(math.log(5))
    assert SHARPEN(tiny.route(1e3 * torch.eye(3), 1), tiny.view((3,))).item() == 0


def test_probabilities_of_zero_have_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [2e3, 0.0, -2e3]], requires_grad=True)
    term = SHARPEN(tiny.route(logits, 1), tiny.view((2,)))
    term.backward()
    assert term.item() == pytest.approx(math.log(2) / 2)
    assert logits.grad.isfinite().all()


def test_padding_changes_nothing_and_answers_are_counted_alone() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    answers = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    logits, probs = LOGITS.clone(), LOGITS.softmax(-1)
    for filler in (0.0, 50.0):
        logits[mask.reshape(-1) == 0] = filler * torch.randn(3, 4).double()
        view = tiny.view((2, 4), mask, answers={"input": answers.bool()})
        torch.testing.assert_close(SHARPEN(tiny.route(logits, 2), view), by_hand(probs, [0, 1, 2, 4, 5]))
        torch.testing.assert_close(SHARPEN(tiny.route(logits, 2), view.only("answers")), by_hand(probs, [1, 2, 4]))


def test_only_padding_is_zero_with_a_graph() -> None:
    term = SHARPEN(tiny.route(torch.randn(4, 3, requires_grad=True), 1), tiny.view((1, 4), torch.zeros(1, 4)))
    assert term.item() == 0 and term.requires_grad


def test_a_recipe_sets_the_direction() -> None:
    found = []
    for losses in ({"entropy": 0.5}, {"entropy": {"weight": 0.5, "maximise": True}}):
        model = tiny.adapted("llama", "meteora", losses=losses)
        with moelora.collect(model) as collected:
            model(**tiny.batch())
        found.append(collected.terms[0]["entropy"])
    assert found[0] > 0
    torch.testing.assert_close(found[0], -found[1])


def test_it_reads_probabilities_not_gates() -> None:
    probs = LOGITS.softmax(-1)
    dense, sparse = Route(torch.ones(8, 4).double(), 4, None, probs=probs), tiny.route(LOGITS, 1)
    torch.testing.assert_close(SHARPEN(dense, tiny.view((8,))), SHARPEN(sparse, tiny.view((8,))))
