"""LoRA-XS experts: square matrices between the singular directions of the base weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.directions import top_directions
from moelora.core.errors import ConfigError
from moelora.model.adapt import parameter_counts
from moelora.model.record import routed_layers
from tests import tiny
from tests.experts import usual

ALPHA, R = 6.0, 3


def experts(num_experts: int = 3, **more: Any) -> dict[str, Any]:
    return {"name": "loraxs", "num_experts": num_experts, "r": R, "lora_alpha": ALPHA, **more}


def moved_start(model: Any) -> Any:
    """The model as an initialiser leaves it that starts from a middle which is not zero."""
    for layer in routed_layers(model):
        layer.experts.start_middle.copy_(layer.experts.middle.detach())
    return model


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("router", "E"), [("softmax", 3), ({"name": "meteora", "top_k": 2}, 4), ("comol", 3)])
def test_equals_the_formula(router: Any, E: int, started: bool) -> None:
    model, layer = usual.toy(experts(E), router)
    if started:
        usual.disturbed(moved_start(model))
    A, B, start = (getattr(layer.experts, name).double() for name in ("basis_A", "basis_B", "start_middle"))
    assert start.any() == started

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(len(x)):
            scores = w["Wg"] @ (A @ x[t] if router == "comol" else x[t])
            gate = usual.best(scores, 2 if E == 4 else E)
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                y = y + gate[e] * (ALPHA / R) * (B @ ((w["middle"][e] - start[e]) @ (A @ x[t])))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    tiny.assert_layer_equals(model, layer, formula)


@pytest.mark.parametrize(("shape", "r"), [((24, 17), 4), ((17, 60), 8), ((70, 90), 6), ((5, 7), 9)])
def test_the_factors_are_the_largest_singular_directions(shape: tuple[int, int], r: int) -> None:
    made = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=made, dtype=torch.float64) * 0.8 ** torch.arange(shape[1])
    A, B = top_directions(weight, r)
    n = min(r, *shape)
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    assert A.shape == (n, shape[1]) and B.shape == (shape[0], n)
    torch.testing.assert_close(B.t() @ B, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(A @ A.t(), torch.diag(S[:n] ** 2), rtol=0, atol=1e-9)
    torch.testing.assert_close(B @ A, U[:, :n] * S[:n] @ V[:n], rtol=0, atol=1e-9)
    assert all(torch.equal(one, two) for one, two in zip((A, B), top_directions(weight, r), strict=True))


def test_every_layer_has_the_directions_of_its_own_weight() -> None:
    model = usual.llama(experts())
    for layer in routed_layers(model):
        weight, own = layer.base_layer.weight.double(), layer.experts
        best = float(torch.linalg.svdvals(weight)[R:].norm())
        assert float((weight - own.basis_B.double() @ own.basis_A.double()).norm()) == pytest.approx(best, rel=1e-5)


def test_a_layer_with_fewer_directions_than_ranks_uses_those_it_has() -> None:
    model = usual.llama(experts(r=36, lora_alpha=36))
    layer = routed_layers(model)[1]  # v_proj: 16 outputs
    own = layer.experts
    torch.testing.assert_close(own.basis_B @ own.basis_A, layer.base_layer.weight, rtol=0, atol=1e-5)
    assert not own.basis_A[16:].any() and not own.basis_B[:, 16:].any()


def test_starts_next_to_the_base_model_and_on_it_where_an_initialiser_says_so() -> None:
    model = usual.llama(experts())
    found = usual.logits(model)
    with moelora.disabled(model):
        base = usual.logits(model)
    assert 0 < (found - base).abs().max() < 1e-3
    middle = torch.cat([layer.experts.middle.detach().flatten() for layer in routed_layers(model)])
    assert 0.8e-5 < middle.std() < 1.2e-5
    usual.assert_starts_as_the_base_model(moved_start(usual.disturbed(model)))


def test_nothing_but_the_middle_is_trained() -> None:
    model = usual.llama(experts())
    assert parameter_counts(model)[0] == sum(3 * (R * R + s.in_features) for s in model.moelora.sites)
    kept = [(layer.experts.basis_A.clone(), layer.experts.basis_B.clone()) for layer in routed_layers(model)]
    usual.trained(model)
    for layer, (A, B) in zip(routed_layers(model), kept, strict=True):
        assert torch.equal(layer.experts.basis_A, A) and torch.equal(layer.experts.basis_B, B)
    again = usual.llama(experts(train="middle"))
    assert parameter_counts(again)[0] == parameter_counts(model)[0]


def test_trains_and_comes_back_bit_for_bit_without_another_svd(tmp_path: Path, monkeypatch: Any) -> None:
    model = usual.trained(usual.disturbed(moved_start(usual.disturbed(usual.llama(experts())))))
    monkeypatch.setattr("moelora.experts.loraxs.top_directions", None)
    usual.assert_comes_back(model, tmp_path)


def test_checkpointing_changes_no_gradient() -> None:
    usual.assert_checkpointing_changes_nothing(usual.disturbed(usual.llama(experts(), "comol")))


def test_every_expert_is_a_plain_lora(tmp_path: Path) -> None:
    model = usual.disturbed(moved_start(usual.disturbed(usual.llama(experts()))), 0.1)
    usual.assert_exports_exactly(model, tmp_path / "out")


def test_constant_gates_are_one_plain_lora(tmp_path: Path) -> None:
    usual.assert_mixture_exports_exactly(usual.disturbed(usual.llama(experts(), "uniform"), 0.1), tmp_path / "out")


def test_what_it_cannot_be_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="router 'smora' is for experts with an A of their own; experts 'loraxs'"):
        usual.llama(experts(), "smora")
    with pytest.raises(ConfigError, match=r"experts\.train: B is for experts with a lora_B; experts 'loraxs' have"):
        usual.llama(experts(train="B"))
    with pytest.raises(ConfigError, match="init sparse sets lora_A and lora_B; experts 'loraxs' train middle"):
        usual.llama(experts(), init="sparse")
