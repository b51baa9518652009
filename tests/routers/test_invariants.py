"""What holds for every router (U1 to U10)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moelora
from moelora.core.methods import Methods
from moelora.model.record import routed_layers
from tests import tiny

CONFIGS = tiny.METHODS
MIXTURES = [name for name, config in CONFIGS.items() if config["experts"].get("num_experts", 1) > 1 or name == "smora"]
TOKENS = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def toy(name: str) -> tuple[Any, Any]:
    return tiny.toy(CONFIGS[name])


def width(model: Any) -> int:
    """Ranks per unit."""
    return model.lin.experts.lora_A.shape[0] // tiny.routes(model, x=TOKENS)[0].units


def test_every_shipped_router_is_here() -> None:
    used = [config["router"] for config in CONFIGS.values()]
    assert {r if isinstance(r, str) else r["name"] for r in used} == set(Methods().names("routers"))


@pytest.mark.parametrize("name", CONFIGS)
def test_u1_zero_up_factor_is_the_base_bit_for_bit(name: str) -> None:
    model, layer = toy(name)
    layer.experts.lora_B.data.zero_()
    assert torch.equal(model(TOKENS), layer.base_layer(TOKENS))


@pytest.mark.parametrize("name", MIXTURES)
def test_u2_units_of_one_token_add_up(name: str) -> None:
    # The update is the gate-weighted sum of the updates that each unit alone, at gate one, would give.
    model, layer = toy(name)
    gate, w = tiny.routes(model, x=TOKENS)[0].dense(), width(model)
    scale = layer.experts.scale[0].double()
    expected = layer.base_layer(TOKENS)
    for u in range(gate.shape[1]):
        own = slice(u * w, (u + 1) * w)
        alone = scale * TOKENS @ layer.experts.lora_A[own].t() @ layer.experts.lora_B[:, own].t()
        expected = expected + gate[:, u : u + 1] * alone
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MIXTURES)
def test_u3_identical_units_are_one_unit_times_the_sum_of_the_gates(name: str) -> None:
    model, layer = toy(name)
    w = width(model)
    units = layer.experts.lora_A.shape[0] // w
    A, B = layer.experts.lora_A.data[:w].clone(), layer.experts.lora_B.data[:, :w].clone()
    layer.experts.lora_A.data.copy_(A.repeat(units, 1))
    layer.experts.lora_B.data.copy_(B.repeat(1, units))
    total = tiny.routes(model, x=TOKENS)[0].dense().sum(1, keepdim=True)
    one = layer.experts.scale[0].double() * TOKENS @ A.t() @ B.t()
    torch.testing.assert_close(model(TOKENS), layer.base_layer(TOKENS) + total * one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MIXTURES)
def test_u4_permuting_units_and_router_rows_changes_nothing(name: str) -> None:
    model, layer = toy(name)
    if "bias" in dict(layer.router.named_buffers()):
        layer.router.bias.copy_(0.1 * torch.randn(layer.router.bias.shape))
    before, w = model(TOKENS), width(model)
    order = torch.randperm(layer.router.weight.shape[0])
    ranks = (order.unsqueeze(1) * w + torch.arange(w)).reshape(-1)
    layer.router.weight.data.copy_(layer.router.weight.data[order])
    if "bias" in dict(layer.router.named_buffers()):
        layer.router.bias.copy_(layer.router.bias[order].clone())
    layer.experts.lora_A.data.copy_(layer.experts.lora_A.data[ranks])
    layer.experts.lora_B.data.copy_(layer.experts.lora_B.data[:, ranks])
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_u6_at_the_start_only_the_up_factor_has_a_gradient(name: str) -> None:
    model, layer = toy(name)
    layer.experts.lora_B.data.zero_()
    x = TOKENS.clone().requires_grad_()
    model(x).square().sum().backward()
    assert (layer.experts.lora_A.grad == 0).all() and (layer.experts.lora_B.grad != 0).any()
    assert all((p.grad == 0).all() for p in layer.router.parameters())
    base = TOKENS.clone().requires_grad_()
    layer.base_layer(base).square().sum().backward()
    assert torch.equal(x.grad, base.grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_u7_a_token_does_not_see_its_neighbours(name: str) -> None:
    model, _ = toy(name)
    model.eval()
    whole = model(TOKENS)
    for t in range(TOKENS.shape[0]):
        torch.testing.assert_close(model(TOKENS[t : t + 1]), whole[t : t + 1], rtol=1e-12, atol=1e-12)
    moved = torch.cat([TOKENS[3:], 100 * TOKENS[:3]])
    torch.testing.assert_close(model(moved)[:5], whole[3:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_u7_in_a_causal_model(name: str) -> None:
    model = tiny.adapted("llama", name, dtype=torch.float64).eval()
    ids = tiny.batch(padded=False)["input_ids"]
    changed = ids.clone()
    changed[1:] = 5  # other rows
    changed[0, 4:] = 6  # later tokens
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits[0, :4], model(input_ids=changed).logits[0, :4], rtol=1e-10, atol=1e-10
        )


def test_u9_renormalised_top_k_of_a_softmax_is_the_softmax_of_the_chosen_logits() -> None:
    model, layer = tiny.toy({"router": {"name": "meteora", "top_k": 3}, "experts": {"num_experts": 7, "r": 2}})
    found = tiny.routes(model, x=TOKENS)[0]
    kept = found.chosen() * (TOKENS @ layer.router.weight.t()).softmax(-1)
    torch.testing.assert_close(found.dense(), kept / kept.sum(1, keepdim=True), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["smora", "smora_blocks", "meteora"])
@pytest.mark.parametrize("loss", ["balance", "z"])
def test_u10_padding_counts_nowhere(name: str, loss: str) -> None:
    terms = []
    for filler in (0, 9, 33):
        model = tiny.adapted("llama", name, losses={loss: 1.0})
        batch = tiny.batch()
        batch["input_ids"][batch["attention_mask"] == 0] = filler
        with moelora.collect(model) as collected:
            model(**batch)
        terms.append(collected.terms[0][loss])
        choices = tiny.routes(model, **batch)[0].index.shape[1]
        loads = list(model.moelora.port.load.values())
        assert len(loads) == (0 if name == "meteora" else len(routed_layers(model)))
        assert all(load.sum() == choices * batch["attention_mask"].sum() for load in loads)
    assert terms[0] == terms[1] == terms[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tokens(name: str) -> None:
    model, _ = toy(name)
    x = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 7)
    y.sum().backward()
    assert x.grad.shape == (0, 5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_any_leading_shape(name: str, shape: tuple[int, ...]) -> None:
    model, _ = toy(name)
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    assert y.shape == (*shape[:-1], 7)
    torch.testing.assert_close(y.reshape(-1, 7), model(x.reshape(-1, 5)), rtol=1e-12, atol=1e-12)
