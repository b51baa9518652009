"""MeteoRA: the formula and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from tests import tiny

ALPHA = 8.0


def oracle(layer: Any) -> tiny.Oracle:
    """Softmax over all logits divided by the temperature, top-k, renormalised."""
    router, experts = layer.router, layer.experts
    r, E = experts.r, experts.num_experts

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            logits = w["Wg"] @ x[t]
            chosen = sorted(range(E), key=lambda e, logits=logits: (-logits[e].item(), e))[: router.top_k]
            raised = (logits / router.temperature).exp() / (logits / router.temperature).exp().sum()
            total = sum(raised[e] for e in chosen)
            y, gate = w["W"] @ x[t] + w["b"], [x.new_zeros(())] * E
            for e in chosen:
                own = slice(e * r, (e + 1) * r)
                gate[e] = raised[e] / total
                y = y + gate[e] * (ALPHA / r) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


def config(num_experts: int = 4, r: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "meteora", **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA},
    }


def expert(layer: Any, e: int, x: Tensor) -> Tensor:
    """The update of one expert alone."""
    own = slice(e * layer.experts.r, (e + 1) * layer.experts.r)
    return ALPHA / layer.experts.r * x @ layer.experts.lora_A[own].t() @ layer.experts.lora_B[:, own].t()


TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num_experts", [1, 3, 4])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 20.0])
def test_equals_the_formula(num_experts: int, top_k: int, temperature: float) -> None:
    model, layer = tiny.toy(config(num_experts, top_k=min(top_k, num_experts), temperature=temperature))
    tiny.assert_layer_equals(model, layer, oracle(layer))


@pytest.mark.parametrize("e", range(4))
def test_one_forced_expert_is_that_expert(e: int) -> None:
    """M1."""
    model, layer = tiny.toy(config(top_k=1))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[e] = 100 * TOKENS[0]
    x = TOKENS[:1]
    assert torch.equal(tiny.routes(model, x=x)[0].weight, torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(model(x), layer.base_layer(x) + expert(layer, e, x), rtol=1e-13, atol=1e-13)


def test_a_large_temperature_is_a_uniform_mixture_of_the_same_choice() -> None:
    """M3."""
    cold, hot = tiny.toy(config(temperature=1.0))[0], tiny.toy(config(temperature=1e12))[0]
    one, two = tiny.routes(cold, x=TOKENS)[0], tiny.routes(hot, x=TOKENS)[0]
    assert torch.equal(one.index, two.index)
    torch.testing.assert_close(two.weight, torch.full_like(two.weight, 0.5), rtol=0, atol=1e-11)
    assert (one.weight - 0.5).abs().max() > 0.01


def test_every_expert_chosen_is_a_dense_softmax_mixture() -> None:
    """M6."""
    model, layer = tiny.toy(config(top_k=4))
    gate = (TOKENS @ layer.router.weight.t()).softmax(-1)
    expected = layer.base_layer(TOKENS) + sum(gate[:, e : e + 1] * expert(layer, e, TOKENS) for e in range(4))
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)


def test_one_expert_is_plain_lora() -> None:
    """M7."""
    mixture, _ = tiny.toy(config(num_experts=1, r=4, top_k=1))
    plain, layer = tiny.toy({"router": "single", "experts": {"r": 4, "lora_alpha": ALPHA}})
    layer.experts.load_state_dict(mixture.lin.experts.state_dict())
    assert torch.equal(mixture(TOKENS), plain(TOKENS))


def test_top_1_gives_the_gate_no_gradient() -> None:
    model, layer = tiny.toy(config(top_k=1))
    model(TOKENS).square().sum().backward()
    assert (layer.router.weight.grad == 0).all() and (layer.experts.lora_B.grad != 0).any()


def test_gates_sum_to_one() -> None:
    route = tiny.routes(tiny.toy(config(top_k=3))[0], x=TOKENS)[0]
    torch.testing.assert_close(route.weight.sum(1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(route.probs.sum(1), torch.ones(9, dtype=torch.float64))


def test_equal_logits_choose_the_first_experts() -> None:
    model, layer = tiny.toy(config(top_k=2))
    torch.nn.init.zeros_(layer.router.weight)
    assert (tiny.routes(model, x=TOKENS)[0].index == torch.tensor([0, 1])).all()


def test_gate_reads_the_input_before_dropout() -> None:
    model, layer = tiny.toy({**config(), "experts": {"num_experts": 4, "r": 2, "lora_dropout": 0.5}})
    seen: list[Tensor] = []
    layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(TOKENS)
    dropped, routed = seen  # the experts ask for the route
    assert torch.equal(routed, TOKENS) and (dropped == 0).any()


def test_more_choices_than_experts_leave_the_model_untouched() -> None:
    model = tiny.llama()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ConfigError, match="top_k 5 is more than the 4 experts"):
        moelora.adapt(model, {**config(), "router": {"name": "meteora", "top_k": 5}})
    assert type(model) is cls and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_gates_are_float32_in_a_bfloat16_model() -> None:
    model = tiny.adapted("llama", "meteora").to(torch.bfloat16)
    for route in tiny.routes(model, **tiny.unlabelled(tiny.batch())):
        assert route.weight.dtype == route.logits.dtype == route.probs.dtype == torch.float32
