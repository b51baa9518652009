"""LoRA-GA: singular directions of the base model's gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga

import moelora
from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.init.lora_ga import LoRAGA
from moelora.model.record import routed_layers
from tests import tiny
from tests.init.steps import LORA, TARGETS, assert_one_step_alike, layer_of, ours, weight_of

BATCHES = [tiny.batch(seed=seed) for seed in range(3)]


def started(out: int = 18, wide: int = 14, num_experts: int = 1, **options: Any) -> Any:
    experts, start = layer_of(weight_of(out, wide), num_experts, r=3, scale=2.0)
    G = weight_of(out, wide, 9)
    LoRAGA(**{"niter": None, **options})(experts, Start(start.weight, gradient=lambda: G.clone()))
    return experts, G


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_every_expert_splits_the_next_directions_of_the_gradient(direction: str) -> None:
    experts, G = started(num_experts=2, direction=direction)
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    times = 18**0.25 / 16**0.5
    for e in range(2):
        own = torch.arange(6 * e, 6 * e + 6)
        halves = {"ArB2r": (own[:3], own[3:]), "A2rBr": (own[3:], own[:3]), "ArBr": (own[1::2], own[::2])}
        k, up = halves[direction]
        rank = slice(3 * e, 3 * e + 3)
        torch.testing.assert_close(experts.lora_A[rank], times * V[k], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(experts.lora_B[:, rank], times * U[:, up], rtol=1e-12, atol=1e-12)


def test_all_experts_may_start_from_the_same_directions() -> None:
    experts, _ = started(num_experts=4, experts="same")
    alone, _ = started()
    assert torch.equal(experts.lora_A, alone.lora_A.repeat(4, 1))
    assert torch.equal(experts.lora_B, alone.lora_B.repeat(1, 4))


def test_scales() -> None:
    unit, _ = started(scale="unit")
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(unit.lora_A @ unit.lora_A.t(), eye, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unit.lora_B.t() @ unit.lora_B, eye, rtol=1e-12, atol=1e-12)
    sigma = torch.linalg.svdvals(weight_of(18, 14))
    factors = {"gd": 0.5, "stable": 18**0.25 / 7**0.5, "weight": float((sigma[:3] / 2).sqrt().mean())}
    for scale, times in factors.items():
        experts, _ = started(scale=scale, gamma=7)
        torch.testing.assert_close(experts.lora_A, times * unit.lora_A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(experts.lora_B, times * unit.lora_B, rtol=1e-12, atol=1e-12)


def test_the_first_step_lies_in_the_leading_2r_directions_of_the_gradient() -> None:
    # A step of SGD changes s B A by -lr s^2 (B B^T G + G A^T A): with disjoint directions the two parts add up.
    experts, G = started(scale="unit")
    A, B = experts.lora_A.detach(), experts.lora_B.detach()
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    best = U[:, :6] @ S[:6].diag() @ V[:6]
    torch.testing.assert_close(B @ (B.t() @ G) + (G @ A.t()) @ A, best, rtol=1e-10, atol=1e-10)


def test_the_fast_decomposition_is_close() -> None:
    fast, _ = started(30, 26, niter=4)
    exact, _ = started(30, 26)
    for half in ("lora_A", "lora_B"):
        one, two = (getattr(experts, half).detach() for experts in (fast, exact))
        torch.testing.assert_close(one.abs(), two.abs(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("direction", "scale"), [("ArB2r", "stable"), ("A2rBr", "stable"), ("ArBr", "stable"), ("ArB2r", "gd")]
)
def test_it_starts_and_trains_as_pefts(direction: Any, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decompose = torch.svd_lowrank

    def seeded(*args: Any, **kwargs: Any) -> Any:  # the signs of singular vectors are those of its random numbers
        torch.manual_seed(42)
        return decompose(*args, **kwargs)

    init = {"name": "lora_ga", "form": "peft", "direction": direction, "scale": scale}
    mine = ours(init, batches=BATCHES)
    base = tiny.llama()
    details = LoraGAConfig(direction=direction, scale={"gd": "gd_scale"}.get(scale, scale))
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=details, target_modules=TARGETS, **LORA)

    def passes() -> None:
        for given in BATCHES:
            base(**given).loss.backward()

    monkeypatch.setattr(torch, "svd_lowrank", seeded)
    preprocess_loraga(base, config, passes)
    peft = get_peft_model(base, config)
    monkeypatch.undo()
    assert_one_step_alike(mine, peft, 2e-4)


def test_pefts_scale_by_the_weight() -> None:
    experts, G = started(scale="weight", form="peft")
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    first = torch.linalg.svdvals(weight_of(18, 14))[0]
    torch.testing.assert_close(experts.lora_A, V[:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(experts.lora_B, U[:, 3:6] * S[3:6] * first / S[3], rtol=1e-12, atol=1e-12)


def test_a_trained_one_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = ours("lora_ga", router="softmax", num_experts=2, batches=BATCHES)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**tiny.batch()).loss.backward()
    sgd.step()
    moelora.save(model.eval(), tmp_path / "own")
    again = moelora.load(tiny.llama(), tmp_path / "own").eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny.batch()).logits, model(**tiny.batch()).logits)
    for layer in routed_layers(again):
        assert (layer.experts.start_B != 0).any() and not torch.equal(layer.experts.start_B, layer.experts.lora_B)


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"init lora_ga takes 18 directions \(slices: 3 experts, r 3\).* has 14"):
        started(num_experts=3)
