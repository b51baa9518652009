"""MoLE: the formula with every expert's output written out, and what the gate teaches the experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from tests import tiny

ALPHA, E, R, S = 6.0, 4, 2, 3  # the layer is given rows of three tokens


def config(pool: str = "prefix", train: str = "all", experts: str = "lora") -> dict[str, Any]:
    own = {"name": experts, "num_experts": E, "r": R, "lora_alpha": ALPHA, "train": train}
    return {"router": {"name": "mole", "pool": pool}, "experts": own}


def oracle(pool: str, experts: str = "lora") -> tiny.Oracle:
    """Outputs of all experts in full, each to unit length, side by side, through the gate."""

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        A = [w["A"][e * R : (e + 1) * R] for e in range(E)]
        B = [ALPHA / R * w["B"][:, e * R : (e + 1) * R] for e in range(E)]
        for t in range(x.shape[0]):
            start = t - t % S
            seen = x[start : t + 1] if pool == "prefix" else x[start : start + S]
            outputs = [B[e] @ (sum(A[e] @ one for one in seen) / len(seen)) for e in range(E)]
            side_by_side = torch.cat([o / o.square().sum().sqrt() for o in outputs])
            raised = (w["Wg"] @ side_by_side / w["log_tau"].exp()).exp()
            gate = raised / raised.sum()
            if experts == "merged":
                update = sum(gate[e] * B[e] for e in range(E)) @ sum(gate[e] * A[e] for e in range(E)) @ x[t]
            else:
                update = sum(gate[e] * B[e] @ A[e] @ x[t] for e in range(E))
            rows.append(w["W"] @ x[t] + w["b"] + update)
            gates.append(gate)
        return torch.stack(rows), torch.stack(gates)

    return formula


def toy(*how: str) -> tuple[Any, Any]:
    model, layer = tiny.toy(config(*how))
    with torch.no_grad():
        layer.router.weight.mul_(10)
        layer.router.log_tau.fill_(-0.5)
    return model, layer


@pytest.mark.parametrize("pool", ["prefix", "sequence"])
@pytest.mark.parametrize("train", ["all", "B", "none"])
def test_equals_the_formula(pool: str, train: str) -> None:
    model, layer = toy(pool, train)
    tiny.assert_layer_equals(model, layer, oracle(pool), tokens=2 * S)


def test_equals_the_formula_with_merged_experts() -> None:
    model, layer = toy("prefix", "all", "merged")
    tiny.assert_layer_equals(model, layer, oracle("prefix", "merged"), tokens=2 * S)


def test_length_of_an_output_does_not_matter_its_direction_does() -> None:
    model, layer = toy()
    x = torch.randn(2, S, 5, dtype=torch.float64)
    before = tiny.routes(model, x=x)[0].weight
    with torch.no_grad():
        layer.experts.lora_B[:, :R] *= 5
    torch.testing.assert_close(tiny.routes(model, x=x)[0].weight, before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layer.experts.lora_B[:, :R] *= -1
    assert not torch.allclose(tiny.routes(model, x=x)[0].weight, before)


def test_the_gate_teaches_the_experts_through_a_loss_on_it() -> None:
    model, layer = toy()
    x = torch.randn(2, S, 5, dtype=torch.float64)
    route: list[Any] = []
    layer.router.register_forward_hook(lambda module, args, out: route.append(out))
    model(x)
    route[0].probs[:, 0].sum().backward()
    assert (layer.experts.lora_A.grad != 0).any() and (layer.experts.lora_B.grad != 0).any()


def test_zero_experts_have_uniform_gates_and_finite_gradients() -> None:
    """At the start B is zero and no output has a direction; the gradient of a direction must not explode there."""
    model = tiny.adapted("llama", "mole", noise=0, losses={"balance": 1.0, "z": 1.0})
    model(**tiny.batch()).loss.backward()
    found = tiny.gradients(model)
    assert all(g.isfinite().all() and g.abs().max() < 10 for g in found.values())
    assert any((g != 0).any() for name, g in found.items() if "lora_B" in name)
    for route in tiny.routes(model, **tiny.batch()):
        assert (route.weight == 0.25).all()


def test_one_zero_expert_among_others_is_left_alone() -> None:
    model, layer = toy()
    with torch.no_grad():
        layer.experts.lora_B[:, :R] = 0
    x = torch.randn(2, S, 5, dtype=torch.float64)
    model(x).square().sum().backward()
    assert layer.experts.lora_B.grad.isfinite().all() and layer.experts.lora_B.grad.abs().max() < 1e4


def test_temperature_sharpens_and_stays_positive() -> None:
    model, layer = toy()
    x = torch.randn(2, S, 5, dtype=torch.float64)
    entropies = []
    for value in (3.0, 0.0, -3.0):
        with torch.no_grad():
            layer.router.log_tau.fill_(value)
        p = tiny.routes(model, x=x)[0].probs
        entropies.append(float(-(p * p.log()).sum(1).mean()))
    assert entropies[0] > entropies[1] > entropies[2] > 0


def test_sizes_and_names() -> None:
    _, layer = tiny.toy(config())
    assert {name: tuple(p.shape) for name, p in layer.router.named_parameters()} == {
        "weight": (E, E * 7),
        "log_tau": (1,),
    }


def test_gates_are_float32_in_a_bfloat16_model() -> None:
    model = tiny.adapted("llama", "mole").to(torch.bfloat16)
    for route in tiny.routes(model, **tiny.unlabelled(tiny.batch())):
        assert route.weight.dtype == route.logits.dtype == torch.float32


def test_other_pools_and_shared_factors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"routers.mole.pool: .*found 'last'"):
        Methods().check("routers", {"name": "mole", "pool": "last"})
    with pytest.raises(ConfigError, match="router 'mole' is for experts with an A of their own"):
        tiny.toy(config(experts="hydra"))
