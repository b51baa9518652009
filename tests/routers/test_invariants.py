"""What holds for every router (U1 to U10)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.methods import Methods
from moelora.core.route import Route
from moelora.experts.base import Experts
from tests import tiny

CONFIGS = tiny.METHODS
# What a router says of itself decides where it takes part, never its name.
TOYS = [name for name in CONFIGS if tiny.router_of(name).around == "linear"]  # the others need a whole block
ADDITIVE = [name for name in TOYS if tiny.experts_of(name).forward is Experts.forward]  # the operator alone mixes
BY_TOKEN = [name for name in TOYS if not tiny.router_of(name).remembers]
IN_LLAMA = [name for name in CONFIGS if tiny.fits("llama", name)]
TOKENS = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
ROWS = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
OUT = 7


def toy(name: str) -> tuple[Any, Any]:
    return tiny.toy(CONFIGS[name])


def tasks(x: Tensor) -> Tensor:
    """A task id per token, from the token itself: whatever moves tokens moves tasks too."""
    return (x[..., 0] > 0).long()


def run(model: Any, x: Tensor) -> Tensor:
    """The model's output; every token has a task, for the routers that ask."""
    y: Tensor = model(x, task_ids=tasks(x))
    return y


def routed(model: Any, x: Tensor = TOKENS) -> Route:
    """The route of the only layer."""
    return tiny.routes(model, x=x, task_ids=tasks(x))[0]


@pytest.mark.parametrize("name", TOYS)
def test_a_router_has_as_many_units_as_it_says(name: str) -> None:
    model, layer = toy(name)
    assert routed(model).units == layer.router.units


def alone(layer: Any, unit: int, units: int, x: Tensor) -> Tensor:
    """The update that one unit alone, at gate one, would give."""
    factors, scale = layer.experts.factors(), layer.experts.scale[0].double()
    if factors.core is not None:
        return scale * x @ factors.A.t() @ factors.core[unit].t() @ factors.B.t()
    columns = factors.B.shape[1]
    own = slice(unit * columns // units, (unit + 1) * columns // units)
    A = factors.A[own] if factors.A.shape[0] == columns else factors.A
    return scale * x @ A.t() @ factors.B[:, own].t()


@torch.no_grad()
def shaken(layer: Any) -> None:
    """Router parameters and buffers as if trained: no two units are alike."""
    for value in layer.router.state_dict(keep_vars=True).values():
        value += 0.3 * torch.randn(value.shape, dtype=value.dtype)


def units_moved(value: Tensor, axis: int, units: int, order: Tensor) -> Tensor:
    """A tensor whose axis holds one entry, or a block of equal size, per unit, in another order."""
    blocks = value.unflatten(axis, (units, -1)).index_select(axis, order)
    return blocks.flatten(axis, axis + 1)


@torch.no_grad()
def permute(layer: Any, units: int, order: Tensor) -> None:
    """Put units in another order: experts, and every axis of the router that counts units or all units' outputs."""
    factors = layer.experts.factors()
    if factors.core is not None:
        factors.core.copy_(factors.core[order])
    else:
        if factors.A.shape[0] == factors.B.shape[1]:
            factors.A.copy_(units_moved(factors.A, 0, units, order))
        factors.B.copy_(units_moved(factors.B, 1, units, order))
    for value in layer.router.state_dict(keep_vars=True).values():
        for axis, size in enumerate(value.shape):
            if size in (units, units * OUT):
                value.copy_(units_moved(value, axis, units, order))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_every_shipped_router_is_here() -> None:
    used = [config["router"] for config in CONFIGS.values()]
    assert {r if isinstance(r, str) else r["name"] for r in used} == set(Methods().names("routers"))
    assert set(CONFIGS) - set(IN_LLAMA) == set()  # every one is tested on a causal model


@pytest.mark.parametrize("name", TOYS)
def test_u1_zero_up_factor_is_the_base_bit_for_bit(name: str) -> None:
    model, layer = toy(name)
    layer.experts.lora_B.data.zero_()
    assert torch.equal(run(model, TOKENS), layer.base_layer(TOKENS))


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("training", [True, False])
def test_u2_units_of_one_token_add_up(name: str, training: bool) -> None:
    # The update is the gate-weighted sum of the updates that each unit alone, at gate one, would give.
    model, layer = toy(name)
    model.train(training)
    gate = routed(model).dense()
    expected = layer.base_layer(TOKENS)
    for u in range(gate.shape[1]):
        expected = expected + gate[:, u : u + 1] * alone(layer, u, gate.shape[1], TOKENS)
    close(run(model, TOKENS), expected)


@pytest.mark.parametrize("name", ADDITIVE)
def test_u3_identical_units_are_one_unit_times_the_sum_of_the_gates(name: str) -> None:
    model, layer = toy(name)
    units, factors = routed(model).units, layer.experts.factors()
    with torch.no_grad():
        for value, axis in ((factors.core, 0), (factors.A, 0), (factors.B, 1)):
            if value is not None and (value is factors.core or factors.core is None):
                blocks = value.unflatten(axis, (units, -1)) if value.shape[axis] % units == 0 else value.unsqueeze(axis)
                value.copy_(blocks.narrow(axis, 0, 1).expand_as(blocks).flatten(axis, axis + 1))
    total = routed(model).dense().sum(1, keepdim=True)
    close(run(model, TOKENS), layer.base_layer(TOKENS) + total * alone(layer, 0, units, TOKENS))


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("training", [True, False])
def test_u4_permuting_units_and_router_rows_changes_nothing(name: str, training: bool) -> None:
    model, layer = toy(name)
    model.train(training)
    shaken(layer)
    units, before = routed(model).units, run(model, TOKENS)
    order = torch.randperm(units)
    permute(layer, units, order)
    followed = order.argsort()[tasks(TOKENS)] if units > 1 else tasks(TOKENS)
    after = [model(TOKENS, task_ids=ids) for ids in (tasks(TOKENS), followed)]  # experts may stand for tasks, or not
    assert any(torch.allclose(y, before, rtol=1e-12, atol=1e-12) for y in after)


@pytest.mark.parametrize("name", TOYS)
def test_u6_at_the_start_only_the_up_factor_has_a_gradient(name: str) -> None:
    model, layer = toy(name)
    layer.experts.lora_B.data.zero_()
    x = TOKENS.clone().requires_grad_()
    run(model, x).square().sum().backward()
    others = [p for p in layer.experts.parameters() if p is not layer.experts.lora_B] + [*layer.router.parameters()]
    assert (layer.experts.lora_B.grad != 0).any()
    assert all((p.grad is None) != p.requires_grad and (p.grad is None or (p.grad == 0).all()) for p in others)
    base = TOKENS.clone().requires_grad_()
    layer.base_layer(base).square().sum().backward()
    assert torch.equal(x.grad, base.grad)


@pytest.mark.parametrize("name", BY_TOKEN)
def test_u7_a_token_does_not_see_its_neighbours(name: str) -> None:
    model, _ = toy(name)
    model.eval()
    whole = run(model, TOKENS)
    for t in range(TOKENS.shape[0]):
        close(run(model, TOKENS[t : t + 1]), whole[t : t + 1])
    moved = torch.cat([TOKENS[3:], 100 * TOKENS[:3]])
    close(run(model, moved)[:5], whole[3:])


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("training", [True, False])
def test_u7_a_token_sees_no_other_row_and_nothing_that_follows(name: str, training: bool) -> None:
    model, _ = toy(name)
    model.train(training)
    whole = run(model, ROWS)
    for b in range(ROWS.shape[0]):
        close(run(model, ROWS[b : b + 1]), whole[b : b + 1])
    for t in range(1, ROWS.shape[1]):
        changed = torch.cat([ROWS[:, :t], -50 * ROWS[:, t:].flip(0)], 1)
        close(run(model, changed)[:, :t], whole[:, :t])


@pytest.mark.parametrize("name", [name for name in TOYS if tiny.router_of(name).remembers])
def test_u7_what_remembers_sees_its_own_past(name: str) -> None:
    # Otherwise the exemption from the test above would hide a router that forgot to be one.
    model, _ = toy(name)
    changed = torch.cat([ROWS[:, :2].flip(0), ROWS[:, 2:]], 1)
    assert (run(model, changed)[:, 2:] - run(model, ROWS)[:, 2:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", IN_LLAMA)
@pytest.mark.parametrize("training", [True, False])
def test_u7_in_a_causal_model(name: str, training: bool) -> None:
    model = tiny.adapted("llama", name, dtype=torch.float64).train(training)
    given = tiny.unlabelled(tiny.given(padded=False))
    changed = given["input_ids"].clone()
    changed[1:] = 5  # other rows
    changed[0, 4:] = 6  # later tokens
    with torch.no_grad():
        torch.testing.assert_close(
            model(**given).logits[0, :4], model(**{**given, "input_ids": changed}).logits[0, :4], rtol=1e-10, atol=1e-10
        )


def test_u9_renormalised_top_k_of_a_softmax_is_the_softmax_of_the_chosen_logits() -> None:
    model, layer = tiny.toy({"router": {"name": "meteora", "top_k": 3}, "experts": {"num_experts": 7, "r": 2}})
    found = routed(model)
    kept = found.chosen() * (TOKENS @ layer.router.weight.t()).softmax(-1)
    torch.testing.assert_close(found.dense(), kept / kept.sum(1, keepdim=True), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        (name, loss)
        for name in IN_LLAMA
        for loss, field in (("balance", "probs"), ("z", "logits"))
        if field in tiny.router_of(name).gives
    ],
)
def test_u10_padding_counts_nowhere(name: str, loss: str) -> None:
    terms = []
    for filler in (0, 9, 33):
        model = tiny.adapted("llama", name, losses={loss: 1.0})
        batch = tiny.given()
        batch["input_ids"][batch["attention_mask"] == 0] = filler
        with moelora.collect(model) as collected:
            model(**batch)
        terms.append(collected.terms[0][loss])
        valid, found = batch["attention_mask"].reshape(-1).bool(), tiny.routes(model, **batch)
        for index, load in model.moelora.port.load.items():
            assert torch.equal(load, found[index].load(valid))
            assert load.sum() <= found[index].units * valid.sum()
    assert terms[0] == terms[1] == terms[2]


@pytest.mark.parametrize("name", TOYS)
def test_no_tokens(name: str) -> None:
    model, _ = toy(name)
    for shape in ((0, 5), (0, 4, 5), (2, 0, 5)):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = run(model, x)
        assert y.shape == (*shape[:-1], OUT)
        y.sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (6, 1, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_any_leading_shape(name: str, shape: tuple[int, ...]) -> None:
    model, _ = toy(name)
    x = torch.randn(shape, dtype=torch.float64)
    y = run(model, x)
    assert y.shape == (*shape[:-1], OUT)
    if not tiny.router_of(name).remembers or len(shape) != 3:  # [B, S, D] is sequences, whose tokens see their past
        close(y.reshape(-1, OUT), run(model, x.reshape(-1, 5)))


@pytest.mark.parametrize("name", IN_LLAMA)
def test_gates_are_float32_in_a_bfloat16_model(name: str) -> None:
    model = tiny.adapted("llama", name).to(torch.bfloat16)
    for route in tiny.routes(model, **tiny.unlabelled(tiny.given())):
        for value in (route.weight, route.logits, route.probs):
            assert value is None or value.dtype == torch.float32


@pytest.mark.parametrize("name", IN_LLAMA)
def test_routes_are_what_the_router_says_they_are(name: str) -> None:
    """Shapes, distinct choices, and exactly the optional fields that ``gives`` names."""
    model, found = tiny.adapted("llama", name), dict[str, Route]()
    for mode in (True, False):
        with torch.no_grad(), moelora.collect(model, lambda view, route: found.update({view.site.name: route})):
            model.train(mode)(**tiny.given())
        assert found
        for site, route in found.items():
            layer, T = model.get_submodule(site), tiny.given()["input_ids"].numel()
            assert route.weight.shape[0] == T and route.weight.isfinite().all()
            if route.index is None:
                assert route.weight.shape == (T, route.units)
            else:
                assert route.index.shape == route.weight.shape and route.index.max() < route.units
                assert all(len(set(row)) == len(row) for row in route.index.tolist())
            for field in ("logits", "probs"):
                value = getattr(route, field)
                assert (value is not None) == (field in layer.router.gives)
                assert value is None or value.shape == (T, route.units)
