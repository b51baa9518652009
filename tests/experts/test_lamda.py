"""LaMDA experts: the formula, the starts, the columns of B that rest, what is saved and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.step import Now
from moelora.model.record import routed_layers
from moelora.train.engine import Engine
from moelora.train.stepping import Stepping
from tests import tiny
from tests.experts import usual

ALPHA, R = 6.0, 3
S = ALPHA / R
STARTS = ["zero_core", "spectral", "code"]


def experts(num_experts: int = 3, **more: Any) -> dict[str, Any]:
    return {"name": "lamda", "num_experts": num_experts, "r": R, "lora_alpha": ALPHA, **more}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("router", "E"), [("softmax", 3), ({"name": "meteora", "top_k": 2}, 4), ("comol", 3)])
def test_equals_the_formula(router: Any, E: int, start: str) -> None:
    if start == "spectral" and router == "comol":
        router = {"name": "comol", "route_on": "x"}
    model = tiny.adapt(tiny.Toy(), {"experts": experts(E, start=start), "router": router, "target_modules": ["lin"]})
    layer = model.lin
    A, B0, M0 = layer.experts.basis_A, layer.experts.up.detach().clone(), layer.experts.middle.detach().clone()
    taken = B0 @ M0[0] if start == "spectral" else torch.zeros(7, R, dtype=torch.float64)
    usual.disturbed(model)

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(len(x)):
            scores = w["Wg"] @ (A @ x[t] if router == "comol" else x[t])
            gate = usual.best(scores, 2 if E == 4 else E)
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                y = y + gate[e] * S * ((w["up"] @ w["middle"][e] - taken) @ (A @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    tiny.assert_layer_equals(model, layer, formula)


@pytest.mark.parametrize("start", STARTS)
def test_factors_start_as_said(start: str) -> None:
    for layer in routed_layers(usual.llama(experts(start=start))):
        own, weight = layer.experts, layer.base_layer.weight
        U, sigma, V = torch.linalg.svd(weight, full_matrices=False)
        if start == "code":
            assert not own.up.any() and own.middle.abs().max() <= R**-0.5 and own.middle.std() > 0.4 * R**-0.5
            assert own.basis_A.abs().max() <= layer.in_features**-0.5
            continue
        best = (U[:, :R] * sigma[:R]) @ V[:R]
        torch.testing.assert_close(own.up @ torch.diag(sigma[:R]) @ own.basis_A, best, rtol=0, atol=1e-4)
        torch.testing.assert_close(own.basis_A @ own.basis_A.t(), torch.eye(R), rtol=0, atol=1e-5)
        expected = torch.diag(sigma[:R]) / S if start == "spectral" else torch.zeros(R, R)
        torch.testing.assert_close(own.middle, expected.expand(3, R, R), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("router", ["meteora", "phatgoose", "task"])
def test_starts_as_the_base_model_whatever_the_gates(start: str, router: str) -> None:
    model, given = usual.llama(experts(start=start), router).eval(), tiny.unlabelled(tiny.given())
    with torch.no_grad():
        found = model(**given).logits
        with moelora.disabled(model):
            expected = model(**given).logits
    if start == "spectral":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def test_what_learns_first() -> None:
    for start, still in (("zero_core", "up"), ("code", "middle"), ("spectral", None)):
        model = usual.llama(experts(start=start)).train()
        model(**tiny.batch()).loss.backward()
        own = routed_layers(model)[0].experts
        assert [name for name in ("up", "middle") if not own.get_parameter(name).grad.any()] == (
            [still] if still else []
        )


def test_a_layer_with_fewer_directions_than_ranks_uses_those_it_has() -> None:
    for start in ("zero_core", "spectral"):
        layer = routed_layers(usual.llama(experts(r=36, start=start)))[1]  # v_proj: 16 outputs
        own = layer.experts
        assert own.basis_A[:16].any(1).all() and not own.basis_A[16:].any() and not own.up[:, 16:].any()


# Columns that rest


def stepped(steps: int, seen: int, **options: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """B and its moments after every one of ``seen`` steps of a training of ``steps``, with much weight decay."""
    torch.manual_seed(0)
    model = usual.llama(experts(r=4, **options)).train()
    optimizer = torch.optim.AdamW(tiny.trainable(model).values(), lr=0.05, weight_decay=0.5)
    stepping = Stepping(model, Engine(model, model, optimizer), None)
    up = routed_layers(model)[0].experts.up
    values, states = [up.detach().clone()], []
    for step in range(seen):
        now = Now(step, steps, 0.05)
        stepping.begin(now)
        model(**tiny.batch(seed=step)).loss.backward()
        stepping.before(now)
        optimizer.step()
        stepping.after(now)
        optimizer.zero_grad()
        values.append(up.detach().clone())
        states.append({key: value.clone() for key, value in optimizer.state[up].items() if value.dim()})
    return values, states


@pytest.mark.parametrize(("steps", "freeze"), [(20, 0.5), (20, 0.3), (30, 0.2), (10, 0.0), (9, 1.0)])
def test_columns_rest_one_after_the_other_and_all_in_the_end(steps: int, freeze: float) -> None:
    seen = min(steps, int(freeze * steps) + 2)
    values, states = stepped(steps, seen, freeze=freeze, start="spectral")
    for step in range(seen):
        resting = 4 if step >= freeze * steps else int(4 * step / (freeze * steps) + 1e-9)
        before, after = values[step], values[step + 1]
        assert torch.equal(after[:, :resting], before[:, :resting])
        assert all((after[:, column] != before[:, column]).all() for column in range(resting, 4))
        if step:
            for key in states[step]:
                assert torch.equal(states[step][key][:, :resting], states[step - 1][key][:, :resting])


def test_the_middle_goes_on_learning() -> None:
    model = usual.llama(experts(freeze=0.0)).train()
    optimizer = torch.optim.AdamW(tiny.trainable(model).values(), lr=0.05)
    stepping = Stepping(model, Engine(model, model, optimizer), None)
    own = routed_layers(model)[0].experts
    up, middle = own.up.detach().clone(), own.middle.detach().clone()
    model(**tiny.batch()).loss.backward()
    stepping.before(Now(0, 10, 0.05))
    optimizer.step()
    assert torch.equal(own.up, up) and (own.middle != middle).all()


# Training, saving, exporting


@pytest.mark.parametrize("start", STARTS)
def test_trains_and_comes_back_bit_for_bit(start: str, tmp_path: Path) -> None:
    model = usual.llama(experts(start=start))
    kept = [layer.experts.basis_A.clone() for layer in routed_layers(model)]
    usual.assert_comes_back(usual.trained(model), tmp_path)
    assert all(torch.equal(a, layer.experts.basis_A) for a, layer in zip(kept, routed_layers(model), strict=True))


def test_checkpointing_changes_no_gradient() -> None:
    usual.assert_checkpointing_changes_nothing(usual.disturbed(usual.llama(experts(start="spectral"))))


@pytest.mark.parametrize("start", STARTS)
def test_every_expert_is_a_plain_lora(start: str, tmp_path: Path) -> None:
    usual.assert_exports_exactly(usual.disturbed(usual.llama(experts(start=start)), 0.1), tmp_path / "out")


@pytest.mark.parametrize("start", STARTS)
def test_constant_gates_are_one_plain_lora(start: str, tmp_path: Path) -> None:
    model = usual.disturbed(usual.llama(experts(start=start), "uniform"), 0.1)
    usual.assert_mixture_exports_exactly(model, tmp_path / "out")


def test_what_it_cannot_be_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router 'comol' is for experts with one A for all; .* 'lamda' have neither"):
        usual.llama(experts(start="spectral"), "comol")
    with pytest.raises(ConfigError, match=r"B starts at zero with experts\.start: code, and has to be trained"):
        usual.llama(experts(start="code", train="middle"))
    with pytest.raises(ConfigError, match="router 'smora' is for experts with an A of their own; experts 'lamda'"):
        usual.llama(experts(), "smora")
    assert [name.rpartition(".")[2] for name in tiny.trainable(usual.llama(experts(train="middle"), "uniform"))] == [
        "middle"
    ] * 6
