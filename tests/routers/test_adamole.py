"""AdaMoLE: the formula, how many experts a token has, and the paper's auxiliary loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from tests import tiny

ALPHA = 8.0
TOKENS = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(num_experts: int = 4, r: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "adamole", **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA},
    }


def oracle(layer: Any) -> tiny.Oracle:
    """Probabilities above the token's threshold, what they exceed it by, divided by the sum of that."""
    r, E, most = layer.experts.r, layer.experts.num_experts, layer.router.max_threshold

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            raised = (w["Wg"] @ x[t]).exp()
            p = raised / raised.sum()
            tau = most / (1 + (-(w["threshold_weight"][0] @ x[t] + w["threshold_bias"][0])).exp())
            kept = [e for e in range(E) if p[e] >= tau]
            total = sum(p[e] - tau for e in kept)
            y, gate = w["W"] @ x[t] + w["b"], [x.new_zeros(())] * E
            for e in kept:
                own = slice(e * r, (e + 1) * r)
                gate[e] = (p[e] - tau) / total
                y = y + gate[e] * (ALPHA / r) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


@pytest.mark.parametrize("num_experts", [1, 4, 6])
@pytest.mark.parametrize("max_threshold", [None, 0.0, 0.1, 0.6, 1.0])
def test_equals_the_formula(num_experts: int, max_threshold: float | None) -> None:
    model, layer = tiny.toy(config(num_experts, max_threshold=max_threshold))
    tiny.assert_layer_equals(model, layer, oracle(layer), tokens=12)


def test_a_token_has_one_expert_at_least_and_their_number_varies() -> None:
    route = tiny.routes(tiny.toy(config(6))[0], x=TOKENS)[0]
    assert route.index is None and route.weight.shape == (40, 6)
    torch.testing.assert_close(route.weight.sum(1), torch.ones(40, dtype=torch.float64))
    assert (route.weight >= 0).all() and len(set(route.chosen().sum(1).tolist())) > 2


def test_no_threshold_is_a_dense_softmax() -> None:
    model, layer = tiny.toy(config(max_threshold=0.0))
    soft = (TOKENS @ layer.router.weight.t()).softmax(-1)
    torch.testing.assert_close(tiny.routes(model, x=TOKENS)[0].weight, soft, rtol=1e-13, atol=1e-13)


def test_a_threshold_above_every_probability_leaves_the_base() -> None:
    model, layer = tiny.toy(config(max_threshold=1.0))
    layer.router.threshold_bias.data.fill_(30.0)
    assert torch.equal(model(TOKENS), layer.base_layer(TOKENS))
    model(TOKENS).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and (p.grad == 0).all() for p in layer.router.parameters())


def test_equal_probabilities_stay_above_the_default_threshold() -> None:
    model, layer = tiny.toy(config())
    torch.nn.init.zeros_(layer.router.weight)
    route = tiny.routes(model, x=TOKENS)[0]
    torch.testing.assert_close(route.weight, torch.full_like(route.weight, 0.25), rtol=1e-12, atol=0)


def test_one_expert_is_plain_lora() -> None:
    mixture, layer = tiny.toy(config(num_experts=1, r=4))
    plain, other = tiny.toy({"router": "single", "experts": {"r": 4, "lora_alpha": ALPHA}})
    other.experts.load_state_dict(layer.experts.state_dict())
    torch.testing.assert_close(mixture(TOKENS), plain(TOKENS), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("max_threshold", [None, 0.6])
def test_the_balance_loss_is_the_papers(max_threshold: float | None) -> None:
    model, layer = tiny.toy({**config(max_threshold=max_threshold), "losses": {"balance": 1.0}})
    mask = torch.ones(4, 10)
    mask[1, 6:] = 0
    with moelora.collect(model) as collected:
        model(TOKENS.view(4, 10, 5), attention_mask=mask)
    found = collected.terms[0]["balance"]
    w = {name: p.detach().clone().requires_grad_() for name, p in layer.router.named_parameters()}
    real = [t for t in range(40) if mask.flatten()[t]]
    total, used = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for t in real:
        p = (w["weight"] @ TOKENS[t]).softmax(0)
        tau = layer.router.max_threshold * (w["threshold_weight"][0] @ TOKENS[t] + w["threshold_bias"][0]).sigmoid()
        total, used = total + (p - tau), used + (p >= tau)
    expected = 4 * (used / len(real) * total / len(real)).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    found.backward()
    expected.backward()
    for name, p in layer.router.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-6, atol=1e-6)


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointed in (False, True):
        model = tiny.adapted("llama", "adamole", losses={"balance": 0.1})
        (tiny.checkpointing(model) if checkpointed else model)(**tiny.batch()).loss.backward()
        found.append(tiny.gradients(model))
    tiny.assert_same(*found)


def test_a_threshold_outside_zero_to_one_is_refused() -> None:
    for wrong in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=r"routers\.adamole\.max_threshold"):
            tiny.toy(config(max_threshold=wrong))


def test_gates_are_float32_in_a_bfloat16_model() -> None:
    model = tiny.adapted("llama", "adamole").to(torch.bfloat16)
    for route in tiny.routes(model, **tiny.unlabelled(tiny.batch())):
        assert route.weight.dtype == route.logits.dtype == route.probs.dtype == torch.float32
