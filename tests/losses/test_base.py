"""What losses share: weights, means over real tokens, and the check that the router gives what they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.losses.base import token_mean
from moelora.losses.z import Z
from tests import tiny


def test_mean_over_all_tokens() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert token_mean(values, None).tolist() == [2, 4]
    assert token_mean(values[:, 0], None).item() == 2


def test_mean_over_real_tokens() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]])
    assert token_mean(values, torch.tensor([True, True, False])).tolist() == [2, 4]


def test_mean_over_no_tokens_is_zero_with_a_graph() -> None:
    values = torch.randn(3, 2, requires_grad=True)
    for some, mask in ((values, torch.zeros(3).bool()), (values[:0], None)):
        mean = token_mean(some, mask)
        assert mean.tolist() == [0, 0] and mean.requires_grad


def test_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="must not be negative, found -1"):
        Z(-1)


@pytest.mark.parametrize("weight", [-0.1, "0.1", None, True, float("nan")])
def test_a_weight_that_is_no_number_of_at_least_zero_leaves_the_model_untouched(weight: Any) -> None:
    model = tiny.llama()
    cls = type(model)
    with pytest.raises(ConfigError, match=r"losses"):
        moelora.adapt(model, {**tiny.METHODS["smora"], "losses": {"z": {"weight": weight}}})
    assert type(model) is cls


def test_a_loss_without_a_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"losses\.z\.weight: expected a number of at least 0, found None"):
        moelora.adapt(tiny.llama(), {**tiny.METHODS["smora"], "losses": {"z": {}}})


def test_unknown_loss_and_unknown_option() -> None:
    for losses, message in (({"balnce": 0.1}, "did you mean 'balance'"), ({"z": {"weight": 1, "k": 2}}, "key 'k'")):
        with pytest.raises(ConfigError, match=message):
            moelora.adapt(tiny.llama(), {**tiny.METHODS["smora"], "losses": losses})


@pytest.mark.parametrize(("name", "reads"), [("balance", "probs"), ("z", "logits"), ("supervised_gate", "logits")])
def test_a_loss_that_reads_what_the_router_does_not_give(name: str, reads: str) -> None:
    model = tiny.llama()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ConfigError, match=rf"losses\.{name} reads the router's {reads}, and router 'single' has none"):
        moelora.adapt(model, {"router": "single", "losses": {name: 0.1}})
    assert type(model) is cls and list(model.state_dict()) == keys


def test_every_shipped_loss_says_what_it_needs() -> None:
    methods = Methods()
    for name in methods.names("losses"):
        assert set(methods.find("losses", name).needs) <= {"logits", "probs"}


def test_the_reported_term_is_the_mean_over_layers() -> None:
    model = tiny.adapted("llama", "smora", losses={"z": 1.0})
    per_layer: list[torch.Tensor] = []

    def observe(view: Any, route: Any) -> None:
        per_layer.append(route.logits.logsumexp(-1).square().mean())

    with moelora.collect(model, observe) as collected:
        model(input_ids=tiny.batch()["input_ids"])
    (terms,) = collected.terms
    assert terms.keys() == {"z"} and terms["z"].dtype == torch.float32
    torch.testing.assert_close(terms["z"], torch.stack(per_layer).mean())
