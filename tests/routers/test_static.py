"""LoRA Soups' weights per layer: the formula and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from tests import tiny

ALPHA = 8.0
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
THETA = torch.tensor([0.3, -1.2, 0.9, 0.1], dtype=torch.float64)


def config(num_experts: int = 4, r: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "static", **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA},
    }


def soup(**options: Any) -> tuple[Any, Any]:
    """A layer whose weights have been trained."""
    model, layer = tiny.toy(config(**options))
    layer.router.theta.data.copy_(THETA)
    return model, layer


def oracle(layer: Any) -> tiny.Oracle:
    """The weights from theta, then the same sum for every token."""
    r, E, kind = layer.experts.r, layer.experts.num_experts, layer.router.weights_fn

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        theta, rows = w["theta"], []
        if kind == "softmax":
            weights = [theta[e].exp() / sum(theta[j].exp() for j in range(E)) for e in range(E)]
        else:
            weights = [theta[e] if kind == "free" else 1 / (1 + (-theta[e]).exp()) for e in range(E)]
        for t in range(x.shape[0]):
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                own = slice(e * r, (e + 1) * r)
                y = y + weights[e] * (ALPHA / r) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
        return torch.stack(rows), torch.stack(weights).expand(x.shape[0], E)

    return formula


@pytest.mark.parametrize("weights_fn", ["softmax", "free", "sigmoid"])
def test_equals_the_formula(weights_fn: str) -> None:
    model, layer = soup(weights_fn=weights_fn)
    tiny.assert_layer_equals(model, layer, oracle(layer))


@pytest.mark.parametrize(("weights_fn", "start"), [("softmax", 0.25), ("free", 0.25), ("sigmoid", 0.5)])
def test_starts_without_a_favourite(weights_fn: str, start: float) -> None:
    weight = tiny.routes(tiny.toy(config(weights_fn=weights_fn))[0], x=TOKENS)[0].weight
    assert torch.equal(weight, torch.full((9, 4), start, dtype=torch.float64))


@pytest.mark.parametrize("weights_fn", ["softmax", "free", "sigmoid"])
@pytest.mark.parametrize("e", range(4))
def test_one_hot_weights_are_that_expert_alone(weights_fn: str, e: int) -> None:
    model, layer = tiny.toy(config(weights_fn=weights_fn))
    off, on = (0.0, 1.0) if weights_fn == "free" else (-1e4, 1e4)
    layer.router.theta.data.fill_(off)[e] = on
    own = slice(2 * e, 2 * e + 2)
    alone = ALPHA / 2 * TOKENS @ layer.experts.lora_A[own].t() @ layer.experts.lora_B[:, own].t()
    torch.testing.assert_close(model(TOKENS), layer.base_layer(TOKENS) + alone, rtol=1e-13, atol=1e-13)


def test_a_layer_is_one_plain_lora() -> None:
    model, layer = soup()
    plain, other = tiny.toy({"router": "single", "experts": {"r": 8, "lora_alpha": 8}})
    columns = ALPHA / 2 * THETA.softmax(0).repeat_interleave(2)
    with torch.no_grad():
        other.experts.lora_A.copy_(layer.experts.lora_A)
        other.experts.lora_B.copy_(layer.experts.lora_B * columns)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-13, atol=1e-13)


def test_one_expert_is_plain_lora() -> None:
    mixture, layer = tiny.toy(config(num_experts=1, r=4))
    plain, other = tiny.toy({"router": "single", "experts": {"r": 4, "lora_alpha": ALPHA}})
    other.experts.load_state_dict(layer.experts.state_dict())
    assert torch.equal(mixture(TOKENS), plain(TOKENS))


def test_training_the_weights_leaves_base_and_experts_as_they_were() -> None:
    experts = {"num_experts": 4, "r": 2, "lora_alpha": ALPHA, "train": "none"}
    model = tiny.adapted("llama", "static", experts=experts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = tiny.trainable(model)
    assert all(name.endswith("router.theta") for name in trained)
    assert sum(p.numel() for p in trained.values()) == 4 * 6  # experts times adapted layers
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    after = model.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) is (name not in trained), name


def test_tokens_do_not_matter() -> None:
    route = tiny.routes(soup()[0], x=TOKENS)[0]
    assert torch.equal(route.weight, route.weight[:1].expand(9, 4)) and route.index is None


def test_weights_are_float32_in_a_bfloat16_model() -> None:
    model = tiny.adapted("llama", "static").to(torch.bfloat16)
    assert all(r.weight.dtype == torch.float32 for r in tiny.routes(model, **tiny.unlabelled(tiny.batch())))


def test_an_unknown_function_and_a_loss_on_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"routers\.static\.weights_fn.*'softmax', 'free' or 'sigmoid'"):
        tiny.toy(config(weights_fn="relu"))
    with pytest.raises(ConfigError, match=r"losses\.balance reads probs"):
        tiny.toy({**config(), "losses": {"balance": 0.01}})
