"""Uni-LoRA experts: all factors of a model from one vector, by an isometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import UniLoraConfig, get_peft_model
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.model.adapt import parameter_counts
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from tests import tiny
from tests.experts import usual

ALPHA, R, LENGTH = 6.0, 2, 50


def experts(num_experts: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "name": "unilora",
        "num_experts": num_experts,
        "r": R,
        "lora_alpha": ALPHA,
        "theta_d_length": LENGTH,
        **more,
    }


def vector(model: Any) -> Any:
    return routed_layers(model)[0].experts.store.theta


def indices(model: Any) -> Tensor:
    """[D] the entry of every number of the whole model."""
    own = [layer.experts for layer in routed_layers(model)]
    return torch.cat([index.flatten() for e in own for index in (e.index_A, e.index_B)]).long()


def numbers(model: Any) -> Tensor:
    """[D] theta_D: all numbers of all factors."""
    factors = [layer.experts.factors() for layer in routed_layers(model)]
    return torch.cat([half.flatten() for each in factors for half in (each.A, each.B)])


@pytest.mark.parametrize(("router", "E"), [("softmax", 3), ({"name": "meteora", "top_k": 2}, 4), ("single", 1)])
def test_equals_the_formula(router: Any, E: int) -> None:
    model, layer = usual.toy(experts(E, theta_d_length=11), router)
    own = layer.experts
    counts = torch.bincount(indices(model), minlength=11).double()

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        A, B = (
            (w["store.theta"] / counts.sqrt())[index.long()] for index in (own.index_A, own.index_B)
        )  # [E*r, D], [O, E*r]
        rows, gates = [], []
        for t in range(len(x)):
            scores = w["Wg"] @ x[t] if E > 1 else x.new_zeros(1)
            gate = usual.best(scores, 2 if E == 4 else E)
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                part = slice(e * R, (e + 1) * R)
                y = y + gate[e] * (ALPHA / R) * (B[:, part] @ (A[part] @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    tiny.assert_layer_equals(model, layer, formula)


@pytest.mark.parametrize("length", [1, 37, 50, 2208])
def test_the_projection_of_the_whole_model_is_an_isometry(length: int) -> None:
    model = usual.llama(experts(theta_d_length=length), dtype=torch.float64)
    index = indices(model)
    assert len(index) == sum(3 * R * (s.in_features + s.out_features) for s in model.moelora.sites) == 2208
    counts = torch.bincount(index, minlength=length)
    assert counts.max() - counts.min() <= 1 and counts.min() >= 1
    P = torch.zeros(len(index), length, dtype=torch.float64)
    P[torch.arange(len(index)), index] = 1 / counts.double().sqrt()[index]
    torch.testing.assert_close(P.t() @ P, torch.eye(length, dtype=torch.float64), rtol=0, atol=1e-12)
    usual.disturbed(model)
    theta = vector(model)
    torch.testing.assert_close(numbers(model), P @ theta, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(numbers(model).norm(), theta.norm(), rtol=1e-13, atol=0)
    upstream = torch.randn(len(index), dtype=torch.float64)
    numbers(model).backward(upstream)
    torch.testing.assert_close(theta.grad, P.t() @ upstream, rtol=1e-12, atol=1e-12)


def test_numbers_that_go_by_one_entry_lie_anywhere() -> None:
    index = indices(usual.llama(experts()))
    assert not torch.equal(index, torch.arange(len(index)) % LENGTH)
    halves = [torch.bincount(half, minlength=LENGTH).double() for half in index.chunk(2)]
    assert all(half.min() > 8 and half.max() < 40 for half in halves)  # 23 on average
    assert not torch.equal(index, indices(usual.llama(experts(seed=1))))


def test_the_assignment_is_the_same_everywhere() -> None:
    """What a later version of torch draws has to be this, or saved adapters mean something else."""
    model = usual.llama(experts())
    assert indices(model)[:8].tolist() == [0, 43, 32, 22, 42, 35, 28, 5]
    for layer in routed_layers(model):
        assert layer.experts.index_A.dtype == layer.experts.index_B.dtype == torch.int32


def test_equals_peft_given_the_same_indices() -> None:
    model = usual.disturbed(usual.llama(experts(1, lora_alpha=R), "single"))
    config = UniLoraConfig(r=R, theta_d_length=LENGTH, target_modules=tiny.TARGETS["llama"])
    peft = get_peft_model(tiny.llama(), config).train()
    peft.base_model.unilora_theta_d["default"].data.copy_(vector(model))
    for layer in routed_layers(model):
        twin, own = peft.base_model.model.get_submodule(layer.site.name), layer.experts
        for half in ("A", "B"):
            index = getattr(own, f"index_{half}")
            scale = own.store.count[index.long()].float().rsqrt()
            theirs = getattr(twin, f"unilora_indices_{half}")
            assert theirs["default"].shape == index.shape
            theirs["default"] = index.long()
            getattr(twin, f"unilora_scales_{half}")["default"] = scale
    torch.testing.assert_close(usual.logits(model), usual.logits(peft), rtol=1e-5, atol=1e-5)
    for one in (model, peft):
        one.train()(**tiny.batch()).loss.backward()
    theirs = peft.base_model.unilora_theta_d["default"].grad
    torch.testing.assert_close(vector(model).grad, theirs, rtol=1e-4, atol=1e-6)


def test_entries_have_as_many_numbers_as_in_peft() -> None:
    model = usual.llama(experts(1), "single")
    config = UniLoraConfig(r=R, theta_d_length=LENGTH, target_modules=tiny.TARGETS["llama"])
    peft = get_peft_model(tiny.llama(), config)
    layers = [peft.base_model.model.get_submodule(layer.site.name) for layer in routed_layers(model)]
    theirs = [getattr(t, f"unilora_indices_{half}")["default"].flatten() for t in layers for half in "AB"]
    one, two = (torch.bincount(index).sort().values for index in (indices(model), torch.cat(theirs)))
    assert torch.equal(one, two)


def test_one_vector_is_all_that_is_trained_and_it_is_saved_once() -> None:
    for num_experts in (2, 4):
        model = usual.llama(experts(num_experts))
        assert len({layer.experts.store for layer in routed_layers(model)}) == 1
        gates = sum(num_experts * site.in_features for site in model.moelora.sites)
        assert parameter_counts(model)[0] == LENGTH + gates
        names = {name: value for name, value in adapter_tensors(model).items() if ".experts." in name}
        assert {name: value.numel() for name, value in names.items()} == {
            "model.layers.0.self_attn.q_proj.experts.store.theta": LENGTH
        }
    assert not vector(usual.llama(experts(train="none"))).requires_grad


def test_starts_next_to_the_base_model() -> None:
    model = usual.llama(experts(init_theta_d_bound=0.01))
    assert 0.008 < vector(model).abs().max() <= 0.01
    found = usual.logits(model)
    with moelora.disabled(model):
        base = usual.logits(model)
    assert 0 < (found - base).abs().max() < 1e-2


def test_layers_with_other_numbers_of_experts_share_it_too(tmp_path: Path) -> None:
    model = usual.disturbed(usual.llama({**experts(), "num_experts": [2, 4]}))
    assert [layer.experts.index_A.shape[0] for layer in routed_layers(model)] == [2 * R] * 3 + [4 * R] * 3
    counts = torch.bincount(indices(model), minlength=LENGTH)
    assert counts.max() - counts.min() <= 1
    usual.assert_comes_back(model, tmp_path)


@pytest.mark.parametrize("threads", [1, 2])
def test_its_gradient_is_the_same_again(threads: int) -> None:
    model, before = usual.disturbed(usual.llama(experts(8, theta_d_length=7))), torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    for _ in range(3):
        model.zero_grad()
        model.train()(**tiny.batch()).loss.backward()
        found.append(vector(model).grad.clone())
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_half_precision_vectors_make_float32_factors() -> None:
    own = routed_layers(usual.llama(experts()))[0].experts.to(torch.bfloat16)
    assert own.factors().A.dtype == torch.float32 and own.store.theta.dtype == torch.bfloat16
    assert own.index_A.dtype == torch.int32 and own.store.count.dtype == torch.int32


def test_trains_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    again = usual.assert_comes_back(usual.trained(usual.llama(experts())), tmp_path)
    assert len({layer.experts.store for layer in routed_layers(again)}) == 1


def test_checkpointing_changes_no_gradient() -> None:
    usual.assert_checkpointing_changes_nothing(usual.disturbed(usual.llama(experts())))


def test_every_expert_is_a_plain_lora(tmp_path: Path) -> None:
    usual.assert_exports_exactly(usual.disturbed(usual.llama(experts()), 1.0), tmp_path / "out")


def test_constant_gates_are_one_plain_lora(tmp_path: Path) -> None:
    usual.assert_mixture_exports_exactly(usual.disturbed(usual.llama(experts(), "uniform"), 1.0), tmp_path / "out")


def test_what_it_cannot_be_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"theta_d_length 9999 is more than all factors have numbers \(2208\)"):
        usual.llama(experts(theta_d_length=9999))
    with pytest.raises(ConfigError, match=r"are one vector for all layers, and a loss .*\(l2_preservation\)"):
        usual.llama(experts(), losses={"l2_preservation": 0.1})
    with pytest.raises(ConfigError, match=r"experts\.train: B is for experts with a lora_B; experts 'unilora' have"):
        usual.llama(experts(train="B"))
