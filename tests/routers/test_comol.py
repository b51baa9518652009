"""CoMoL: the formula, its invariants, and what its forward never makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moelora
from moelora.core.errors import ConfigError
from moelora.ops import reference
from tests import tiny

ALPHA, E, R = 6.0, 4, 3  # a scale that float32 holds exactly
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
ROUTE_ON = pytest.mark.parametrize("route_on", ["h", "x"])


def config(num_experts: int = E, r: int = R, route_on: str = "h", **experts: Any) -> dict[str, Any]:
    return {
        "router": {"name": "comol", "route_on": route_on},
        "experts": {"name": "core", "num_experts": num_experts, "r": r, "lora_alpha": ALPHA, **experts},
    }


def oracle(layer: Any) -> tiny.Oracle:
    """One merged core per token, as the paper writes it."""
    experts, router = layer.experts, layer.router

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            h = w["A"] @ x[t]
            raised = (w["Wg"] @ (h if router.reads == "h" else x[t])).exp()
            gate = raised / raised.sum()
            merged = sum(gate[e] * w["core"][e] for e in range(experts.num_experts))
            rows.append(w["W"] @ x[t] + w["b"] + (ALPHA / experts.r) * (w["B"] @ (merged @ h)))
            gates.append(gate)
        return torch.stack(rows), torch.stack(gates)

    return formula


def update(layer: Any, core: Tensor, x: Tensor = TOKENS) -> Tensor:
    """(lora_alpha / r) B core A x, one core for all tokens."""
    experts = layer.experts
    return ALPHA / experts.r * x @ experts.lora_A.t() @ core.t() @ experts.lora_B.t()


def assert_update(model: Any, layer: Any, expected: Tensor) -> None:
    torch.testing.assert_close(model(TOKENS), layer.base_layer(TOKENS) + expected, rtol=1e-12, atol=1e-12)


@ROUTE_ON
@pytest.mark.parametrize("num_experts", [1, 2, 4])
@pytest.mark.parametrize("r", [1, 3])
def test_equals_the_formula(route_on: str, num_experts: int, r: int) -> None:
    model, layer = tiny.toy(config(num_experts, r, route_on))
    tiny.assert_layer_equals(model, layer, oracle(layer))


@ROUTE_ON
def test_zero_up_factor_is_the_base(route_on: str) -> None:
    """C1."""
    model, layer = tiny.toy(config(route_on=route_on))
    assert not torch.equal(model(TOKENS), layer.base_layer(TOKENS))
    torch.nn.init.zeros_(layer.experts.lora_B)
    assert torch.equal(model(TOKENS), layer.base_layer(TOKENS))


@ROUTE_ON
def test_identity_cores_are_plain_lora_for_any_router(route_on: str) -> None:
    """C2."""
    model, layer = tiny.toy(config(route_on=route_on))
    with torch.no_grad():
        layer.experts.core.copy_(torch.eye(R).expand(E, R, R))
        layer.router.weight.mul_(5)
    plain, lora = tiny.toy({"router": "single", "experts": {"r": R, "lora_alpha": ALPHA}})
    own = layer.experts.state_dict()
    lora.experts.load_state_dict({"lora_A": own["lora_A"], "lora_B": own["lora_B"]})
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-13, atol=1e-13)


@ROUTE_ON
def test_one_expert_is_its_product_whatever_the_router_says(route_on: str) -> None:
    """C3."""
    model, layer = tiny.toy(config(1, route_on=route_on))
    torch.nn.init.normal_(layer.router.weight, std=10)
    assert torch.equal(tiny.routes(model, x=TOKENS)[0].weight, torch.ones(9, 1, dtype=torch.float64))
    assert_update(model, layer, update(layer, layer.experts.core[0]))


@ROUTE_ON
def test_a_zero_router_is_the_average_core(route_on: str) -> None:
    """C4."""
    model, layer = tiny.toy(config(route_on=route_on))
    torch.nn.init.zeros_(layer.router.weight)
    assert_update(model, layer, update(layer, layer.experts.core.mean(0)))


@ROUTE_ON
@pytest.mark.parametrize("e", range(E))
def test_a_certain_router_is_one_expert(route_on: str, e: int) -> None:
    """C5."""
    model, layer = tiny.toy(config(route_on=route_on))
    x = TOKENS[:1]
    seen = x @ layer.experts.lora_A.t() if route_on == "h" else x
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[e] = 1e4 * seen[0] / seen.square().sum()
    gate = tiny.routes(model, x=x)[0].weight[0]
    assert gate[e] == 1 and gate.sum() == 1
    expected = layer.base_layer(x) + update(layer, layer.experts.core[e], x)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@ROUTE_ON
def test_three_ways_to_compute_it_agree(route_on: str) -> None:
    """C6: a Khatri-Rao product, one merged core per token, and a mixture of the experts' outputs."""
    model, layer = tiny.toy(config(route_on=route_on))
    experts, gate = layer.experts, tiny.routes(model, x=TOKENS)[0].weight
    h, scale = TOKENS @ experts.lora_A.t(), ALPHA / R
    rows = (gate.unsqueeze(2) * h.unsqueeze(1)).flatten(1)  # [T, E r]
    khatri_rao = scale * rows @ experts.core.transpose(1, 2).flatten(0, 1) @ experts.lora_B.t()
    merged = torch.einsum("te,eij->tij", gate, experts.core)
    one_core = scale * torch.einsum("tij,tj->ti", merged, h) @ experts.lora_B.t()
    outputs = sum(gate[:, e : e + 1] * update(layer, experts.core[e]) for e in range(E))
    for expected in (khatri_rao, one_core, outputs):
        assert_update(model, layer, expected)
    transposed = sum(gate[:, e : e + 1] * update(layer, experts.core[e].t()) for e in range(E))
    assert not torch.allclose(outputs, transposed, rtol=0.1)  # the agreement says which way round a core stands


@ROUTE_ON
def test_parameters_are_as_many_as_the_formula_says(route_on: str) -> None:
    """C8."""
    model = tiny.adapted("llama", "comol", router={"name": "comol", "route_on": route_on})
    e, r = model.moelora.config.experts.num_experts, model.moelora.config.experts.r
    expected = 0
    for site in model.moelora.sites:
        wide, out = site.in_features, site.out_features
        expected += r * (wide + out) + e * r * r + e * (r if route_on == "h" else wide)
    assert sum(p.numel() for p in tiny.trainable(model).values()) == expected


@ROUTE_ON
def test_dropout_is_on_the_input_alone(route_on: str) -> None:
    model, layer = tiny.toy(config(route_on=route_on, lora_dropout=0.5))
    seen: dict[str, Tensor] = {}
    layer.router.register_forward_pre_hook(lambda module, args: seen.update(router=args[0]))
    layer.experts.register_forward_pre_hook(lambda module, args: seen.update(experts=args[0]))
    y = model(TOKENS)
    dropped = seen["experts"]
    assert (dropped == 0).any() and torch.equal(dropped[dropped != 0], 2 * TOKENS[dropped != 0])
    h = dropped @ layer.experts.lora_A.t()
    assert torch.equal(seen["router"], h if route_on == "h" else TOKENS)
    gate = (seen["router"] @ layer.router.weight.t()).softmax(-1)
    delta = sum(gate[:, e : e + 1] * update(layer, layer.experts.core[e], dropped) for e in range(E))
    torch.testing.assert_close(y, layer.base_layer(TOKENS) + delta, rtol=1e-12, atol=1e-12)


def test_cores_in_rank_space_need_one_a_for_all() -> None:
    model = tiny.llama()
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match="'comol' is for experts with one A for all; experts 'lora' have an A"):
        moelora.adapt(model, {"router": "comol", "experts": {"num_experts": 4, "r": 2}})
    assert list(model.state_dict()) == keys


def test_routed_on_the_input_it_mixes_loras_too() -> None:
    model, layer = tiny.toy({**config(route_on="x"), "experts": {"num_experts": 2, "r": 2, "lora_alpha": ALPHA}})
    gate, experts = (TOKENS @ layer.router.weight.t()).softmax(-1), layer.experts
    parts = [TOKENS @ experts.lora_A[e : e + 2].t() @ experts.lora_B[:, e : e + 2].t() for e in (0, 2)]
    assert_update(model, layer, ALPHA / 2 * sum(gate[:, e : e + 1] * part for e, part in enumerate(parts)))


@pytest.mark.parametrize("method", ["comol", "comol_x"])
def test_routing_is_float32_in_a_bfloat16_model(method: str) -> None:
    model = tiny.adapted("llama", method).to(torch.bfloat16)
    given = tiny.unlabelled(tiny.batch())
    for route in tiny.routes(model, **given):
        assert route.weight.dtype == route.logits.dtype == route.probs.dtype == torch.float32
        torch.testing.assert_close(route.weight.sum(1), torch.ones(len(route.weight)), rtol=0, atol=1e-6)
    model(**tiny.batch()).loss.backward()
    assert all(torch.isfinite(grad).all() for grad in tiny.gradients(model).values())


class Largest(TorchDispatchMode):
    """The number of elements of the largest result of any operation, inside our operators too."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = {
            "routed_lora": reference.forward,
            "routed_lora_backward": reference.backward,
            "project": lambda x, weights: x @ torch.cat(weights).t(),
            "project_backward": lambda dh, x, weights, *_: (dh @ torch.cat(weights), dh.t() @ x),
        }
        if func.namespace == "moelora":
            with self:
                return plain[func._opname](*(arg for arg in args if arg != "dense"))
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@ROUTE_ON
def test_no_core_and_no_output_per_token_and_expert_is_ever_made(route_on: str) -> None:
    tokens, e, r, out = 64, 3, 16, 40
    model, _ = tiny.toy(config(e, r, route_on), wide=20, out=out)
    x = torch.randn(tokens, 20, dtype=torch.float64, requires_grad=True)
    with Largest() as largest:
        model(x).square().sum().backward()
    # [T, E, r] has 3072 elements, more than [T, O] and [T, D]; [T, r, r] would have 16384 and [T, E, O] 7680.
    assert largest.numel == tokens * e * r
