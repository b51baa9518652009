"""Core orthogonality: mean squared cosine between cores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.losses.core_orthogonality import CoreOrthogonality
from moelora.model.record import routed_layers
from tests import tiny

LOSS = CoreOrthogonality(1.0)


def term(core: Tensor) -> Tensor:
    width = core.shape[-1]
    factors = Factors(torch.ones(width, 5), torch.ones(7, width), torch.ones(width), core)
    return LOSS(Route(torch.ones(2, len(core)), len(core)), replace(tiny.view((2,)), factors=factors))


def by_hand(core: Tensor) -> Tensor:
    """The formula as a loop over ordered pairs."""
    total, pairs = core.new_zeros(()), 0
    for i, one in enumerate(core):
        for j, two in enumerate(core):
            if i != j:
                cosine = (one * two).sum() / (one.square().sum().sqrt() * two.square().sum().sqrt())
                total, pairs = total + cosine**2, pairs + 1
    return total / pairs


@pytest.mark.parametrize("experts", [2, 3, 7])
def test_value_and_gradient_are_those_of_the_formula(experts: int) -> None:
    core = torch.randn(experts, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine, theirs = core.clone().requires_grad_(), core.clone().requires_grad_()
    found, expected = term(mine), by_hand(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-12)


def test_orthogonal_is_zero_and_parallel_one() -> None:
    assert term(torch.eye(9).view(9, 3, 3)).item() == pytest.approx(0, abs=1e-12)
    one = torch.randn(1, 3, 3)
    assert term(torch.cat([one, -2 * one, 0.1 * one])).item() == pytest.approx(1)


def test_the_size_of_a_core_does_not_matter() -> None:
    core = torch.randn(4, 3, 3)
    torch.testing.assert_close(term(core * torch.tensor([1.0, 10, 0.1, -3]).view(4, 1, 1)), term(core))


def test_one_expert_is_zero_with_a_graph() -> None:
    core = torch.randn(1, 3, 3, requires_grad=True)
    term(core).backward()
    assert term(core).item() == 0 and (core.grad == 0).all()


def test_cores_of_zero_are_no_trouble() -> None:
    core = torch.randn(3, 2, 2)
    core[1] = 0
    core.requires_grad_()
    term(core).backward()
    assert term(core).item() <= 1 / 3 and core.grad.isfinite().all()


def test_steps_downhill_part_the_cores_of_a_model() -> None:
    model = tiny.adapted("llama", "comol", losses={"core_orthogonality": 1.0})
    cores = [layer.experts.core for layer in routed_layers(model)]
    sgd = torch.optim.SGD(cores, lr=5.0)
    seen = []
    for _ in range(8):
        with moelora.collect(model) as collected:
            model(**tiny.batch())
        seen.append(collected.terms[0]["core_orthogonality"])
        torch.testing.assert_close(seen[-1], torch.stack([by_hand(core) for core in cores]).mean())
        sgd.zero_grad()
        seen[-1].backward()
        sgd.step()
    assert seen[-1] < 0.3 * seen[0]


def test_experts_without_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"losses\.core_orthogonality reads core, which neither"):
        moelora.adapt(tiny.llama(), {**tiny.METHODS["meteora"], "losses": {"core_orthogonality": 1.0}})


def test_it_counts_no_tokens() -> None:
    losses = {"core_orthogonality": {"weight": 1.0, "tokens": "answers"}}
    with pytest.raises(ConfigError, match=r"losses\.core_orthogonality is about the experts and counts no tokens"):
        moelora.adapt(tiny.llama(), {**tiny.METHODS["comol"], "losses": losses})
