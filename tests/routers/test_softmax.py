"""The dense soft gate: the formula, dense and cut to k, and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from tests import tiny

ALPHA = 8.0
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(num_experts: int = 4, r: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "softmax", **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA},
    }


def oracle(layer: Any) -> tiny.Oracle:
    """Softmax over all logits divided by the temperature; the k largest of it, divided by their sum or not."""
    router, r, E = layer.router, layer.experts.r, layer.experts.num_experts

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            raised = ((w["Wg"] @ x[t]) / router.temperature).exp()
            p = raised / raised.sum()
            kept = sorted(range(E), key=lambda e, p=p: (-p[e].item(), e))[: router.top_k or E]
            total = sum(p[e] for e in kept) if router.renorm else 1
            y, gate = w["W"] @ x[t] + w["b"], [x.new_zeros(())] * E
            for e in kept:
                own = slice(e * r, (e + 1) * r)
                gate[e] = p[e] / total
                y = y + gate[e] * (ALPHA / r) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("renorm", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equals_the_formula(num_experts: int, top_k: int | None, renorm: bool, temperature: float) -> None:
    k = None if top_k is None else min(top_k, num_experts)
    model, layer = tiny.toy(config(num_experts, top_k=k, renorm=renorm, temperature=temperature))
    tiny.assert_layer_equals(model, layer, oracle(layer))


@pytest.mark.parametrize("renorm", [True, False])
def test_all_experts_chosen_are_the_dense_gate(renorm: bool) -> None:
    (dense, one), (cut, two) = (tiny.toy(config(top_k=k, renorm=renorm)) for k in (None, 4))
    assert tiny.routes(dense, x=TOKENS)[0].index is None and tiny.routes(cut, x=TOKENS)[0].index is not None
    torch.testing.assert_close(cut(TOKENS), dense(TOKENS), rtol=1e-13, atol=1e-13)
    for model in (dense, cut):
        model(TOKENS).square().sum().backward()
    torch.testing.assert_close(two.router.weight.grad, one.router.weight.grad, rtol=1e-11, atol=1e-11)


def test_renormalised_top_k_is_the_softmax_of_the_chosen_logits() -> None:
    """U9."""
    found = tiny.routes(tiny.toy(config(7, top_k=3, temperature=0.5))[0], x=TOKENS)[0]
    kept = found.chosen() * found.probs
    torch.testing.assert_close(found.dense(), kept / kept.sum(1, keepdim=True), rtol=1e-14, atol=1e-14)


def test_without_renormalisation_the_mass_of_the_others_is_lost() -> None:
    found = tiny.routes(tiny.toy(config(7, top_k=3, renorm=False))[0], x=TOKENS)[0]
    torch.testing.assert_close(found.dense(), found.chosen() * found.probs, rtol=0, atol=0)
    assert (found.weight.sum(1) < 0.99).all()


@pytest.mark.parametrize("renorm", [True, False])
def test_who_gets_gradient(renorm: bool) -> None:
    """A2: renormalised, the chosen alone. A3: otherwise every logit, also with a single choice."""
    model, layer = tiny.toy(config(top_k=2, renorm=renorm))
    model(TOKENS[:1]).square().sum().backward()
    chosen = tiny.routes(model, x=TOKENS[:1])[0].chosen()[0].bool()
    moved = (layer.router.weight.grad != 0).any(1)
    assert moved[chosen].all() and bool(moved[~chosen].all()) is not renorm

    model, layer = tiny.toy(config(top_k=1, renorm=renorm))
    model(TOKENS).square().sum().backward()
    assert bool((layer.router.weight.grad == 0).all()) is renorm


def test_a_small_temperature_is_one_expert_and_a_large_one_is_the_mean() -> None:
    cold, hot = (tiny.routes(tiny.toy(config(temperature=t))[0], x=TOKENS)[0].weight for t in (1e-6, 1e9))
    assert torch.equal(cold, torch.nn.functional.one_hot(cold.argmax(1), 4).double())
    torch.testing.assert_close(hot, torch.full_like(hot, 0.25), rtol=0, atol=1e-8)


def test_one_expert_is_plain_lora() -> None:
    mixture, layer = tiny.toy(config(num_experts=1, r=4))
    plain, other = tiny.toy({"router": "single", "experts": {"r": 4, "lora_alpha": ALPHA}})
    other.experts.load_state_dict(layer.experts.state_dict())
    assert torch.equal(mixture(TOKENS), plain(TOKENS))


def test_equal_logits_choose_the_first_experts() -> None:
    model, layer = tiny.toy(config(top_k=2))
    torch.nn.init.zeros_(layer.router.weight)
    assert (tiny.routes(model, x=TOKENS)[0].index == torch.tensor([0, 1])).all()


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"routers\.softmax: top_k 5 is more than the 4 experts"):
        tiny.toy(config(top_k=5))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        tiny.toy(config(**options))


def test_gates_are_float32_in_a_bfloat16_model() -> None:
    model = tiny.adapted("llama", "softmax").to(torch.bfloat16)
    for route in tiny.routes(model, **tiny.unlabelled(tiny.batch())):
        assert route.weight.dtype == route.logits.dtype == route.probs.dtype == torch.float32


def test_attention_may_have_one_expert_each_beside_routed_layers() -> None:
    router = {"name": "softmax", "attention": "lora"}
    model = tiny.adapted("llama", "softmax", router=router, losses={"balance": 0.1})
    for layer, route in zip(routed_layers(model), tiny.routes(model, **tiny.batch()), strict=True):
        beside = "self_attn" in layer.site.name
        assert layer.experts.num_experts == route.units == (1 if beside else 4)
        assert (route.weight == 1).all() == beside == (not [*layer.router.parameters()])
    model(**tiny.batch()).loss.backward()
    tiny.gradients(model)
