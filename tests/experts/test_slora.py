"""SLoRA experts: a square matrix between A and B, trained with them or alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.model.adapt import parameter_counts
from moelora.model.record import routed_layers
from tests import tiny
from tests.experts import usual

ALPHA, R = 6.0, 3
FROM_SLICES = """
import torch
from moelora.init.base import Init, halves


class FromSlices(Init):
    moves = True

    @torch.no_grad()
    def __call__(self, experts, start):
        A, B = halves("from_slices", experts)
        A.copy_(start.weight()[: len(A)])
        B.copy_(start.weight()[:, : len(A)])
"""


def experts(num_experts: int = 3, **more: Any) -> dict[str, Any]:
    return {"name": "slora", "num_experts": num_experts, "r": R, "lora_alpha": ALPHA, **more}


def from_slices(folder: Path, **more: Any) -> Any:
    """A llama whose experts start from factors that are not zero, less their product."""
    plugin = folder / "from_slices.py"
    plugin.write_text(FROM_SLICES)
    config = {"experts": experts(**more), "router": "meteora", "init": "from_slices", "target_modules": ["q_proj"]}
    torch.manual_seed(0)
    return moelora.adapt(tiny.llama(), config, plugins=[plugin], verbose=False)


@pytest.mark.parametrize("train", ["all", "B", "middle"])
@pytest.mark.parametrize("E", [1, 3])
def test_equals_the_formula(train: str, E: int) -> None:
    init = {"init": {"name": "sparse"}} if train == "middle" else {}
    model, layer = usual.toy(experts(E, train=train), "softmax" if E > 1 else "single", **init)

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(len(x)):
            gate = (w["Wg"] @ x[t]).softmax(-1) if E > 1 else x.new_ones(1)
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                own = slice(e * R, (e + 1) * R)
                h = w["A"][own] @ x[t]
                y = y + gate[e] * (ALPHA / R) * (w["B"][:, own] @ (w["middle"][e] @ h))
            rows.append(y)
            gates.append(gate)
        return torch.stack(rows), torch.stack(gates)

    tiny.assert_layer_equals(model, layer, formula)


@pytest.mark.parametrize("router", ["smora", "mole", "arrow", "task"])
def test_routers_of_single_ranks_and_of_a_have_their_lora(router: str) -> None:
    """Whatever a router gates, the update is that of plain LoRA with A and B N, seen by the same router."""
    more = {"router": {"name": "task", "num_tasks": 3}} if router == "task" else {"router": router}
    model = usual.disturbed(usual.llama(experts(), **more))
    plain = usual.llama({**experts(), "name": "lora"}, **more)
    for layer, twin in zip(routed_layers(model), routed_layers(plain), strict=True):
        factors = layer.experts.factors()
        twin.experts.load_state_dict({"lora_A": factors.A, "lora_B": factors.B})
        twin.router.load_state_dict(layer.router.state_dict())
        for each in (layer, twin):
            each.router.prepare(each.experts.factors())
    with torch.no_grad():
        found, expected = (one.eval()(**tiny.given()).logits for one in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_starts_as_the_base_model() -> None:
    model = usual.llama(experts())
    usual.assert_starts_as_the_base_model(model)
    for layer in routed_layers(model):
        middle = layer.experts.middle.detach()
        assert 0.8 / math.sqrt(R) < middle.abs().max() <= 1 / math.sqrt(R) and middle.std() > 0.4 / math.sqrt(R)
    sizes = [3 * (R * (s.in_features + s.out_features) + R * R + s.in_features) for s in model.moelora.sites]
    assert parameter_counts(model)[0] == sum(sizes)


def test_the_middle_alone_is_trained_between_factors_that_an_initialiser_set(tmp_path: Path) -> None:
    model = from_slices(tmp_path, train="middle")
    found = usual.logits(model)
    with moelora.disabled(model):
        torch.testing.assert_close(found, usual.logits(model), rtol=1e-5, atol=1e-5)
    layers = routed_layers(model)
    kept = [(layer.experts.lora_A.detach().clone(), layer.experts.lora_B.detach().clone()) for layer in layers]
    usual.trained(model)
    assert (usual.logits(model) - found).abs().max() > 1e-3
    for layer, (A, B) in zip(layers, kept, strict=True):
        trains = {name: p.numel() for name, p in layer.experts.named_parameters() if p.requires_grad}
        assert trains == {"middle": 3 * R * R}
        assert torch.equal(layer.experts.lora_A, A) and torch.equal(layer.experts.lora_B, B)


def test_what_is_subtracted_is_the_product_of_all_three(tmp_path: Path) -> None:
    model = from_slices(tmp_path)
    layer = routed_layers(model)[0]
    start = {name: p.detach().clone().double() for name, p in layer.experts.named_parameters()}
    usual.disturbed(model, 0.2)
    now = {name: p.detach().double() for name, p in layer.experts.named_parameters()}
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    for e in range(3):
        own = slice(e * R, (e + 1) * R)
        delta = sum(
            sign * w["lora_B"][:, own] @ w["middle"][e] @ w["lora_A"][own] for sign, w in ((1, now), (-1, start))
        )
        gates = torch.eye(3, dtype=torch.float64)[[e]].expand(5, -1)
        update = layer.experts(x, lambda *_, gates=gates: moelora.core.route.Route(gates, 3))
        torch.testing.assert_close(update, ALPHA / R * x @ delta.t(), rtol=1e-5, atol=1e-5)


def test_trains_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    usual.assert_comes_back(usual.trained(usual.llama(experts())), tmp_path)


def test_checkpointing_changes_no_gradient() -> None:
    usual.assert_checkpointing_changes_nothing(usual.disturbed(usual.llama(experts())))


def test_every_expert_is_a_plain_lora(tmp_path: Path) -> None:
    usual.assert_exports_exactly(usual.disturbed(usual.llama(experts()), 0.2), tmp_path / "out")


def test_constant_gates_are_one_plain_lora(tmp_path: Path) -> None:
    usual.assert_mixture_exports_exactly(usual.disturbed(usual.llama(experts(), "uniform"), 0.2), tmp_path / "out")


def test_training_the_middle_behind_a_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.train: middle trains nothing with init kaiming: B starts at zero"):
        usual.llama(experts(train="middle"))
    with pytest.raises(ConfigError, match=r"train: middle is for experts with a matrix between A and B .*'lora' have"):
        usual.llama({**experts(train="middle"), "name": "lora"})
