"""Spectrum: the sum of squared singular values."""

from __future__ import annotations

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from tests import tiny

KASA = {"name": "kasa", "num_experts": 3, "r": 4}


def test_value_and_gradient_are_those_of_the_formula() -> None:
    model = tiny.adapted("llama", "meteora", experts=KASA, losses={"spectrum": 0.5})
    with moelora.collect(model) as collected:
        model(**tiny.batch())
    term = collected.terms[0]["spectrum"]
    layers = routed_layers(model)
    expected = sum((layer.experts.sigma.detach().double() ** 2).sum() for layer in layers) / len(layers)
    assert float(term) == pytest.approx(float(expected), rel=1e-6)
    term.backward()
    for layer in layers:
        torch.testing.assert_close(layer.experts.sigma.grad, 2 * layer.experts.sigma.detach() / len(layers))


def test_steps_downhill_shrink_them() -> None:
    model = tiny.adapted("llama", "meteora", experts=KASA, losses={"spectrum": 0.5})
    sigma = routed_layers(model)[0].experts.sigma
    sgd, before = torch.optim.SGD([sigma], lr=1.0), float(sigma.detach().norm())
    for _ in range(3):
        sgd.zero_grad()
        with moelora.collect(model) as collected:
            model(**tiny.batch())
        collected.terms[0]["spectrum"].backward()
        sgd.step()
    assert float(sigma.detach().norm()) < 0.5 * before


def test_experts_without_singular_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"losses\.spectrum reads sigma, which neither"):
        tiny.adapted("llama", "meteora", losses={"spectrum": 0.1})


def test_it_counts_no_tokens() -> None:
    with pytest.raises(ConfigError, match=r"losses\.spectrum is about the experts and counts no tokens"):
        tiny.adapted("llama", "meteora", experts=KASA, losses={"spectrum": {"weight": 0.1, "tokens": "answers"}})
