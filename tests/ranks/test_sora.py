"""SoRA: gated ranks, the proximal step, and the plain LoRA that is left."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.step import Now
from moelora.model.config import resolve
from moelora.model.record import routed_layers
from moelora.ranks.sora import dead_zone, soft_threshold
from moelora.tools.export import export_peft
from moelora.tools.export.plain import single_expert
from moelora.train.run import build_trainer
from tests import tiny
from tests.ranks.runs import Run, experts_of, model_with, plain
from tests.tools.test_export import CLOSE, in_peft, logits, only


def test_a_layer_is_gated_ranks_between_lora_halves() -> None:
    model = tiny.shake(model_with("sora"), 0.3)
    layer = routed_layers(model)[0]
    experts = layer.experts
    gate = experts.allocator.gate
    assert 0.5 < gate.std() < 1.6 and gate.dtype == torch.float64
    A, B, g = (p.detach().clone().requires_grad_() for p in (experts.lora_A, experts.lora_B, gate))
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    update = layer(x) - layer.base_layer(x)
    expected = plain(layer, x, A * g.unsqueeze(1), B, 2.0)
    up = torch.randn_like(update)
    model.zero_grad()
    (update * up).sum().backward()
    (expected * up).sum().backward()
    torch.testing.assert_close(update, expected, rtol=1e-10, atol=1e-12)
    for mine, theirs in ((experts.lora_A, A), (experts.lora_B, B), (gate, g)):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_the_base_model_starts_unchanged_and_gates_of_one_are_lora() -> None:
    model, lora = model_with("sora"), model_with("full")
    with moelora.disabled(model):
        base = model(**tiny.given()).logits
    assert torch.equal(model(**tiny.given()).logits, base)
    for experts in experts_of(model):
        experts.allocator.gate.data.fill_(1)
    lora.load_state_dict(model.state_dict(), strict=False)
    found, expected = (tiny.shake(one, 0.3)(**tiny.given()).logits for one in (model, lora))
    assert torch.equal(found, expected)


def test_a_step_is_that_of_the_optimiser_and_then_the_proximal_one() -> None:
    model = tiny.shake(model_with({"name": "sora", "xi": 0.7}), 0.3)
    gates = [experts.allocator.gate for experts in experts_of(model)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = [gate.detach().clone() for gate in gates]
    Run(model, optimizer=optimizer).step()
    for gate, old in zip(gates, before, strict=True):
        moved = old - 0.05 * gate.grad
        expected = moved.sign() * torch.relu(moved.abs() - 0.05 * 0.7)
        torch.testing.assert_close(gate.detach(), expected, rtol=0, atol=1e-12)


def test_the_threshold_follows_the_learning_rate_or_not_and_the_stages() -> None:
    def thresholds(steps: int = 6, **options: object) -> list[float]:
        sora = experts_of(model_with({"name": "sora", **options}))[0].allocator
        return [sora.threshold(Now(step, steps, 0.5)) for step in range(steps)]

    assert thresholds(xi=0.2) == [0.1] * 6 and thresholds(xi=0.2, times_lr=False) == [0.2] * 6
    stages = {"xi": 0.8, "times_lr": False, "stages": 3, "first": 0.2}
    assert thresholds(**stages) == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.8, 0.8])
    middle = math.log((math.exp(0.2) + math.exp(0.8)) / 2)
    assert thresholds(**stages, schedule="log_linear")[2] == pytest.approx(middle)
    assert thresholds(**stages, schedule="exp_linear") == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.8, 0.8])


def test_the_proximal_step_is_a_contraction_that_reaches_zero_and_the_released_one_jumps() -> None:
    u, v = torch.randn(2, 500, dtype=torch.float64)
    xi = 0.3
    close = (soft_threshold(u, xi) - soft_threshold(v, xi)).abs() <= (u - v).abs() + 1e-12
    assert close.all() and torch.allclose(soft_threshold(u, xi).abs(), torch.relu(u.abs() - xi))
    gate, steps = torch.tensor([1.0, -0.25, 0.1], dtype=torch.float64), 0
    while gate.any():
        gate, steps = soft_threshold(gate, xi), steps + 1
    assert steps == math.ceil(1.0 / xi)
    released = dead_zone(torch.tensor([0.15, 0.25, -0.15, -0.25, 0.05, 0.1, 0.0], dtype=torch.float64), 0.1)
    assert released.tolist() == pytest.approx([0, 0.15, 0, -0.15, 0, 0.1, 0])


def test_the_released_rule_is_taken_when_asked_for() -> None:
    model = tiny.shake(model_with({"name": "sora", "official": True, "times_lr": False, "xi": 0.4}), 0.3)
    Run(model, lr=1e-6).step()
    left = torch.cat([experts.allocator.gate.detach() for experts in experts_of(model)])
    assert (left == 0).any() and left[left != 0].abs().min() > 0.4 - 1e-4


def test_a_gate_without_gradient_is_not_shrunk_and_one_at_zero_may_come_back() -> None:
    run = Run(model_with({"name": "sora", "xi": 0.2}))
    gates = [experts.allocator.gate for experts in experts_of(run.model)]
    before = [gate.detach().clone() for gate in gates]
    run.step()  # B is zero, and so are all gradients of gates
    assert all(torch.equal(gate, old) for gate, old in zip(gates, before, strict=True))
    with torch.no_grad():
        tiny.shake(run.model, 1.0)
        gates[0].zero_()
    run.step(times=2)
    assert (gates[0] != 0).any() and not any("live" in name for name in run.stepping.tensors())


def test_what_is_left_is_a_plain_lora_of_that_rank_and_the_same_scale(tmp_path: Path) -> None:
    model = tiny.shake(model_with("sora", dtype=torch.float32), 0.3)
    for experts in experts_of(model):
        with torch.no_grad():
            experts.allocator.gate[[0, 2, 5, 8, 9, 10, 11]] = 0
    found = [single_expert(experts_of(model)[0], expert) for expert in range(3)]
    assert [lora.rank for lora in found] == [2, 3, 0] and found[0].scale == 2.0
    export = export_peft(model, tmp_path / "out")
    assert any("expert_2 has no rank left in any layer" in note for note in export.notes)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"expert_0", "expert_1", "export.json"}
    lora = in_peft(tmp_path / "out" / "expert_1", "llama")
    torch.testing.assert_close(lora, logits(only(model, 1), "llama"), **CLOSE)


def test_gates_are_not_decayed() -> None:
    trainer = build_trainer.__globals__["MoeLoraTrainer"]
    names = trainer.get_decay_parameter_names(trainer.__new__(trainer), model_with("sora"))
    assert any(name.endswith("lora_A") for name in names) and not any("gate" in name.split(".") for name in names)


def test_equal_factors_from_zero_are_refused() -> None:
    config = {"router": "meteora", "experts": {"num_experts": 2, "r": 4}}
    with pytest.raises(ConfigError, match=r"ranks.sora: exp_linear multiplies: first 0.0 and xi 0.4 have to be more"):
        resolve({**config, "ranks": {"name": "sora", "stages": 3, "schedule": "exp_linear"}}, Methods())
