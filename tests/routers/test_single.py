"""Single: plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from tests import tiny
from tests.adapters import peft_folder

CONFIG = {"router": "single", "experts": {"r": 4, "lora_alpha": 8}}


def oracle(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    rows = [w["W"] @ token + w["b"] + 8 / 4 * (w["B"] @ (w["A"] @ token)) for token in x]
    return torch.stack(rows), x.new_ones(x.shape[0], 1)


def test_equals_the_formula() -> None:
    model, layer = tiny.toy(CONFIG)
    tiny.assert_layer_equals(model, layer, oracle)


def test_has_no_parameters() -> None:
    _, layer = tiny.toy(CONFIG)
    assert list(layer.router.state_dict()) == []


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_scale(use_rslora: bool, scale: float) -> None:
    _, layer = tiny.toy({**CONFIG, "experts": {"r": 4, "lora_alpha": 8, "use_rslora": use_rslora}})
    assert (layer.experts.scale == scale).all()


def test_more_than_one_expert_leaves_the_model_untouched() -> None:
    model = tiny.llama()
    cls = type(model)
    with pytest.raises(ConfigError, match="takes num_experts: 1, found 2"):
        moelora.adapt(model, {"router": "single", "experts": {"num_experts": 2}})
    assert type(model) is cls and all(p.requires_grad for p in model.parameters())


def test_a_layer_that_its_adapter_lacks_adds_nothing(tmp_path: Path) -> None:
    experts = {"r": 4, "adapters": [str(peft_folder(tmp_path, target_modules=["q_proj"]))]}
    model = tiny.adapt(tiny.llama(), {"router": "single", "experts": experts, "target_modules": ["q_proj", "v_proj"]})
    assert model.model.layers[0].self_attn.q_proj.experts.ranks == [4]
    assert model.model.layers[0].self_attn.v_proj.experts.ranks == [0]
