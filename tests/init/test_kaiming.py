"""Kaiming: LoRA's own start."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.core.tape import Site
from moelora.experts.lora import LoRA
from moelora.init.kaiming import Kaiming
from tests import tiny


def made(num_experts: int = 4, r: int = 8, wide: int = 50) -> LoRA:
    experts = LoRA(Site("layer", 0, wide, 30), num_experts, r)
    Kaiming()(experts, tiny.START)
    return experts


def test_up_factor_is_zero() -> None:
    assert (made().lora_B == 0).all()


def test_down_factor_is_uniform_within_the_bound_of_one_expert() -> None:
    # The bound depends on the input width only, so stacking experts does not change it.
    for num_experts in (1, 16):
        down = made(num_experts, 8, 50).lora_A
        bound = 1 / math.sqrt(50)
        assert down.abs().max() <= bound
        assert down.abs().max() > 0.95 * bound
        assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert down.mean().abs() < 0.1 * bound


def test_experts_start_different() -> None:
    first, second, *_ = made().lora_A.split(8)
    assert not torch.equal(first, second)


def test_same_seed_same_start() -> None:
    starts = []
    for _ in range(2):
        torch.manual_seed(7)
        starts.append(made().lora_A)
    assert torch.equal(*starts)
    assert not torch.equal(starts[0], made().lora_A)


def test_parameters_still_train() -> None:
    assert all(p.requires_grad for p in made().parameters())


ODD_EXPERTS = """
import torch
from torch import nn
from moelora.core.factors import Factors
from moelora.experts.base import Experts


class Odd(Experts):
    def __init__(self, site, num_experts, r):
        super().__init__(site, num_experts, r)
        self.down = nn.Parameter(torch.empty(num_experts * r, site.in_features))
        self.up = nn.Parameter(torch.empty(site.out_features, num_experts * r))

    def factors(self):
        return Factors(self.down, self.up, self.scale)
"""


def test_a_refusal_leaves_the_model_untouched(tmp_path: Path) -> None:
    plugin = tmp_path / "odd.py"
    plugin.write_text(ODD_EXPERTS)
    model = tiny.llama()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ConfigError, match=r"experts Odd have \['down', 'up'\], which nothing sets"):
        moelora.adapt(model, {"experts": {"name": "odd"}}, plugins=[plugin], verbose=False)
    assert type(model) is cls and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
