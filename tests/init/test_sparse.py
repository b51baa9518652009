"""Sparse: FlyLoRA's frozen random down factor."""

from __future__ import annotations

import pytest
import torch

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.tape import Site
from moelora.experts.core import Core
from moelora.experts.lora import LoRA
from moelora.init.sparse import Sparse
from moelora.model.record import routed_layers
from tests import tiny


def made(r: int = 32, wide: int = 400, density: float = 0.25, num_experts: int = 1) -> LoRA:
    experts = LoRA(Site("layer", 0, wide, 30), num_experts, r)
    Sparse(density=density)(experts, tiny.START)
    return experts


@pytest.mark.parametrize(
    ("wide", "density", "count"), [(400, 0.25, 100), (50, 0.25, 12), (50, 1.0, 50), (7, 0.5, 4), (10, 0.01, 1)]
)
def test_every_row_has_just_as_many_entries(wide: int, density: float, count: int) -> None:
    for num_experts in (1, 3):
        rows = made(8, wide, density, num_experts).lora_A
        assert rows.shape == (8 * num_experts, wide)
        assert ((rows != 0).sum(1) == count).all()


@pytest.mark.parametrize("r", [8, 32])
def test_entries_are_normal_with_a_spread_of_one_by_r(r: int) -> None:
    A = made(r, 4000).lora_A
    entries = r * A[A != 0]
    assert entries.mean().abs() < 0.05 and entries.std().item() == pytest.approx(1, rel=0.05)
    assert (entries.abs() > 2).float().mean().item() == pytest.approx(0.0455, rel=0.3)  # as of a normal, not a uniform


def test_places_differ_between_rows_and_reach_every_input() -> None:
    places = made(200, 40).lora_A != 0
    assert len({tuple(row.tolist()) for row in places}) == 200
    assert (places.float().mean(0) - 0.25).abs().max() < 0.12


def test_up_factor_is_zero() -> None:
    assert (made().lora_B == 0).all()


def test_same_seed_same_start() -> None:
    starts = []
    for _ in range(2):
        torch.manual_seed(7)
        starts.append(made().lora_A)
    assert torch.equal(*starts) and not torch.equal(starts[0], made().lora_A)


def test_a_frozen_down_factor_stays_sparse_in_training() -> None:
    config = {"router": "flylora", "init": "sparse", "experts": {"r": 16, "train": "B"}}
    model = tiny.adapt(tiny.llama(), {**config, "target_modules": ["q_proj", "down_proj"]})
    before = [layer.experts.lora_A.clone() for layer in routed_layers(model)]
    assert sorted({name.rsplit(".", 1)[1] for name in tiny.trainable(model)}) == ["lora_B"]
    sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=0.5, weight_decay=0.1)
    for _ in range(2):
        model(**tiny.batch()).loss.backward()
        sgd.step()
    for layer, A in zip(routed_layers(model), before, strict=True):
        assert torch.equal(layer.experts.lora_A, A) and (layer.experts.lora_B != 0).any()
        assert ((A != 0).sum(1) == round(0.25 * layer.in_features)).all()


def test_works_without_memory() -> None:
    with torch.device("meta"):
        assert made().lora_A.is_meta


def test_other_parameterisations_and_densities_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"init sparse sets lora_A and lora_B; experts 'core' train core, lora_A, "):
        Sparse()(Core(Site("layer", 0, 8, 8), 2, 2), tiny.START)
    for density in (0.0, 1.5):
        with pytest.raises(ConfigError, match=rf"init.sparse.density: .*found {density}"):
            Methods().check("init", {"name": "sparse", "density": density})
