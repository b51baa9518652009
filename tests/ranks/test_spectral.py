"""LaMDA++'s rank plan from the spectra of the base weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.model.config import resolve
from moelora.model.record import routed_layers
from moelora.ranks.spectral import Spectral
from moelora.tools.export.plain import single_expert
from tests import tiny
from tests.ranks.runs import Run, experts_of, model_with, plain


def weight(values: list[float], out: int = 8, wide: int = 8) -> torch.Tensor:
    """A matrix with these singular values."""
    made = torch.Generator().manual_seed(len(values))
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=made, dtype=torch.float64))[0] for n in (out, wide))
    return U[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ V[:, : len(values)].t()


def planned(weights: list[torch.Tensor], r: int = 8, **options: Any) -> list[int]:
    own = []
    for index, one in enumerate(weights):
        out, wide = one.shape
        own.append(Spectral(Site(f"layer.{index}", index, wide, out), 2, r, **options))
        own[-1].begin(Start(one.clone))
    own[0].plan(own)
    return [int(one.rank) for one in own]


def test_energy_is_that_of_the_singular_values() -> None:
    one = Spectral(Site("x", 0, 5, 7), 1, 4)
    W = torch.randn(7, 5, dtype=torch.float64)
    one.begin(Start(W.clone))
    squares = torch.linalg.eigvalsh(W.t() @ W).flip(0)
    torch.testing.assert_close(torch.tensor(one.energy).double(), squares.cumsum(0) / squares.sum())
    one.candidates = [2, 100]
    assert one.held(1) == pytest.approx(1.0)  # a small layer holds all there is


def test_flat_layers_get_more_within_the_budget() -> None:
    steep, middle, flat = weight([9, 1, 1]), weight([3, 2, 1, 1]), weight([1] * 8)
    assert planned([steep, flat, steep, flat], mean_r=4, candidates=[2, 4, 6]) == [2, 6, 2, 6]
    assert planned([steep, middle, flat], mean_r=4) == [2, 2, 8]
    assert planned([steep, middle, flat], mean_r=4, direction="concentrated") == [8, 2, 2]
    assert planned([flat] * 4, mean_r=4) == [4] * 4
    assert planned([steep, flat], mean_r=4, candidates=[4]) == [4, 4]


def test_the_budget_is_of_parameters_and_the_plan_is_monotone() -> None:
    made = torch.Generator().manual_seed(0)
    slopes = torch.rand(12, generator=made).tolist()
    square = [weight([(1 - 0.9 * slope) ** i for i in range(8)]) for slope in slopes]
    found = planned(square, mean_r=3, candidates=[1, 2, 4, 8])
    assert sum(found) <= 3 * 12 < sum(found) + 4
    by_slope = [rank for _, rank in sorted(zip(slopes, found, strict=True))]
    assert by_slope == sorted(by_slope, reverse=True) and len(set(found)) > 2
    shapes = [(40, 8), (8, 8), (8, 8), (8, 24)]
    mixed = [weight([1] * 8, *shape) for shape in shapes]
    found = planned(mixed, mean_r=4, candidates=[2, 4, 8])
    size = [out + wide for out, wide in shapes]
    assert sum(r * n for r, n in zip(found, size, strict=True)) <= 4 * sum(size)


def test_a_model_is_planned_when_it_is_adapted_and_uses_these_ranks() -> None:
    base = tiny.llama(0, torch.float64)
    for block in base.model.layers:
        block.self_attn.q_proj.weight.data.copy_(weight([5, 1, 1], 32, 32))
    model = model_with({"name": "spectral", "mean_r": 2, "candidates": [1, 2, 3]}, base=base)
    found = [int(experts.allocator.rank) for experts in experts_of(model)]
    sizes = [layer.in_features + layer.out_features for layer in routed_layers(model)]
    assert len(set(found)) > 1 and sum(r * n for r, n in zip(found, sizes, strict=True)) <= 2 * sum(sizes)
    tiny.shake(model, 0.3)
    for layer, rank in zip(routed_layers(model), found, strict=True):
        experts = layer.experts
        A, B = experts.lora_A.detach().unflatten(0, (3, 4)), experts.lora_B.detach().unflatten(1, (3, 4))
        x = torch.randn(6, layer.in_features, dtype=torch.float64)
        expected = plain(layer, x, A[:, :rank].flatten(0, 1), B[:, :, :rank].flatten(1), 8 / rank)
        torch.testing.assert_close(layer(x) - layer.base_layer(x), expected, rtol=1e-6, atol=1e-6)
        lora = single_expert(experts, 1)
        assert (lora.rank, lora.scale) == (rank, pytest.approx(8 / rank))


def test_masked_ranks_rest() -> None:
    run = Run(tiny.shake(model_with({"name": "spectral", "mean_r": 2, "candidates": [1, 2, 4]}), 0.3))
    before = [(experts.lora_A.detach().clone(), experts.lora_B.detach().clone()) for experts in experts_of(run.model)]
    run.step(times=2)
    for experts, (A, B) in zip(experts_of(run.model), before, strict=True):
        used = (torch.arange(4) < experts.allocator.rank).repeat(3)
        assert torch.equal((experts.lora_A != A).any(1), used) and torch.equal((experts.lora_B != B).any(0), used)


def test_impossible_plans_are_refused() -> None:
    config: dict[str, Any] = {"router": "meteora", "experts": {"num_experts": 2, "r": 4}}
    for options, said in (
        ({"mean_r": 5}, "ranks.spectral: mean_r 5 is more than experts.r, which is 4"),
        ({"candidates": [2, 8]}, "ranks.spectral: candidates 8 is more than experts.r"),
        ({"mean_r": 1, "candidates": [2, 4]}, r"the lowest of candidates \[2, 4\] is more than mean_r 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolve({**config, "ranks": {"name": "spectral", **options}}, Methods())
