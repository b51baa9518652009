"""Specialisation balance: sum P f and an entropy whose sign the recipe states."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.route import Route
from moelora.losses.balance import Balance
from moelora.losses.specialisation_balance import SpecialisationBalance
from tests import tiny

PRINTED, PROSE = SpecialisationBalance(1.0, entropy_coef=-0.3), SpecialisationBalance(1.0, entropy_coef=0.3)
LOGITS = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(probs: Tensor, tokens: list[int], coef: float) -> Tensor:
    """The formula as a loop over tokens and units."""
    n, units = len(tokens), probs.shape[1]
    mean, share, entropy = [probs.new_zeros(()) for _ in range(units)], [0.0] * units, probs.new_zeros(())
    for t in tokens:
        row = probs[t]
        share[max(range(units), key=lambda u: row[u].item())] += 1 / n  # max takes the first of equals
        for u in range(units):
            mean[u] = mean[u] + row[u] / n
            entropy = entropy - row[u] * row[u].log() / n
    return sum(p * f for p, f in zip(mean, share, strict=True)) + coef * entropy


@pytest.mark.parametrize("loss", [PRINTED, PROSE])
def test_value_and_gradient_are_those_of_the_formula(loss: SpecialisationBalance) -> None:
    mine, theirs = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    term = loss(tiny.route(mine, 2), tiny.view((8,))).alone()
    expected = by_hand(theirs.softmax(-1), list(range(8)), loss.entropy_coef)
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=1e-12)
    term.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("coef", [-0.5, 0.0, 2.0])
def test_uniform_is_one_over_the_units(coef: float) -> None:
    """L2. With equal probabilities it does not matter which unit a tie falls to."""
    loss = SpecialisationBalance(1.0, entropy_coef=coef)
    uniform = loss(tiny.route(torch.zeros(4, 4), 1), tiny.view((4,))).alone()
    assert uniform.item() == pytest.approx(1 / 4 + coef * math.log(4))
    level = torch.stack([torch.arange(4.0).roll(shift) for shift in range(4)])  # another favourite for every token
    assert SpecialisationBalance(1.0, entropy_coef=0.0)(
        tiny.route(level, 1), tiny.view((4,))
    ).alone().item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("coef", [-0.5, 0.0, 2.0])
def test_one_unit_for_all_is_one(coef: float) -> None:
    """L3. And entropy is zero, whatever it weighs, with a finite gradient."""
    logits = torch.tensor([[0.0, 2e3, 0.0]]).repeat(4, 1).requires_grad_()
    term = SpecialisationBalance(1.0, entropy_coef=coef)(tiny.route(logits, 1), tiny.view((4,))).alone()
    term.backward()
    assert term.item() == pytest.approx(1)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("coef", [-1.0, 1.0])
def test_the_sign_of_the_entropy_is_the_recipe_s(coef: float) -> None:
    """L4: below zero a step downhill raises each token's entropy, above zero it lowers it."""
    logits = LOGITS.clone().requires_grad_()

    def entropy(of: Tensor) -> Tensor:
        return -(of.softmax(-1) * of.log_softmax(-1)).sum(-1)

    terms = [
        SpecialisationBalance(1.0, entropy_coef=c)(tiny.route(logits, 1), tiny.view((8,))).alone() for c in (coef, 0.0)
    ]
    (grad,) = torch.autograd.grad(terms[0] - terms[1], logits)
    p = LOGITS.softmax(-1)
    torch.testing.assert_close(grad, -coef * p * (p.log() + entropy(LOGITS).unsqueeze(-1)) / 8)
    after = entropy(LOGITS - 0.05 * grad)
    assert (after > entropy(LOGITS)).all() if coef < 0 else (after < entropy(LOGITS)).all()


def test_shares_have_no_gradient() -> None:
    route = tiny.route(LOGITS.clone().requires_grad_(), 1)
    (grad,) = torch.autograd.grad(
        SpecialisationBalance(1.0, entropy_coef=0.0)(route, tiny.view((8,))).alone(), route.probs
    )
    share = torch.nn.functional.one_hot(LOGITS.argmax(-1), 4).double().mean(0)
    torch.testing.assert_close(grad, (share / 8).expand(8, 4))


def test_scaled_it_is_switch_s_balance_and_entropy_keeps_its_size() -> None:
    route, view = tiny.route(LOGITS, 1), tiny.view((8,))
    scaled = SpecialisationBalance(1.0, entropy_coef=0.0, scale_by_experts=True)(route, view).alone()
    torch.testing.assert_close(scaled, Balance(1.0)(route, view).alone())
    apart = SpecialisationBalance(1.0, entropy_coef=0.3, scale_by_experts=True)(route, view).alone() - scaled
    torch.testing.assert_close(apart, PROSE(route, view).alone() - scaled / 4)


def test_ties_go_to_the_lowest_unit() -> None:
    probs = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4]])
    loss = SpecialisationBalance(1.0, entropy_coef=0.0)
    assert loss(Route(probs, 3, probs=probs), tiny.view((2,))).alone().item() == pytest.approx(0.5 * 0.3 + 0.5 * 0.4)


def test_padding_changes_nothing_and_answers_are_counted_alone() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    answers = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    logits, probs = LOGITS.clone(), LOGITS.softmax(-1)
    for filler in (0.0, 50.0):
        logits[mask.reshape(-1) == 0] = filler * torch.randn(3, 4).double()
        view = tiny.view((2, 4), mask, answers={"input": answers.bool()})
        torch.testing.assert_close(PROSE(tiny.route(logits, 2), view).alone(), by_hand(probs, [0, 1, 2, 4, 5], 0.3))
        torch.testing.assert_close(
            PROSE(tiny.route(logits, 2), view.only("answers")).alone(), by_hand(probs, [1, 2, 4], 0.3)
        )


def test_only_padding_is_zero_with_a_graph() -> None:
    term = PROSE(tiny.route(torch.randn(4, 3, requires_grad=True), 1), tiny.view((1, 4), torch.zeros(1, 4))).alone()
    assert term.item() == 0 and term.requires_grad


def test_the_sign_must_be_chosen() -> None:
    for spec in (0.1, {"weight": 0.1, "scale_by_experts": True}):
        with pytest.raises(ConfigError, match=r"losses\.specialisation_balance\.entropy_coef: required, but not given"):
            moelora.adapt(tiny.llama(), {**tiny.METHODS["meteora"], "losses": {"specialisation_balance": spec}})
