"""adapt: what it puts where, and what it says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import moelora
from moelora.core.errors import ConfigError
from moelora.model.adapt import fingerprint, parameter_counts
from moelora.model.config import AdapterConfig
from moelora.model.layer import RoutedLinear
from moelora.model.record import routed_layers
from moelora.model.routed import RoutedModel
from tests import tiny

CONFIG = {"router": {"name": "smora", "top_k": 4}, "experts": {"r": 8}, "target_modules": ["q_proj", "v_proj"]}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".router." in key or ".experts." in key}


def test_every_way_to_give_a_configuration_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "adapter.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    made = []
    for config in (CONFIG, AdapterConfig(**CONFIG), str(path), path):
        torch.manual_seed(0)
        made.append(state(moelora.adapt(tiny.llama(), config, verbose=False)))
    for other in made[1:]:
        tiny.assert_same(made[0], other)


def test_layers_stand_where_their_base_layers_stood() -> None:
    base = tiny.llama()
    q = base.model.layers[0].self_attn.q_proj
    model = tiny.adapt(base, CONFIG)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, RoutedLinear) and layer.base_layer is q
    assert layer.weight is q.weight and layer.bias is q.bias
    assert (layer.in_features, layer.out_features) == (32, 32) and "in_features=32" in repr(layer)
    assert [found.site.name for found in routed_layers(model)] == [
        f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")
    ]


def test_a_layer_at_the_root() -> None:
    model = tiny.adapt(tiny.Toy(), {**CONFIG, "target_modules": ["lin"]})
    assert isinstance(model.lin, RoutedLinear)


def test_sites_start_different() -> None:
    first, second, *_ = routed_layers(tiny.adapt(tiny.llama(), CONFIG))
    assert not torch.equal(first.experts.lora_A, second.experts.lora_A[:, :32])
    assert not torch.equal(first.router.weight, second.router.weight)


def test_the_base_is_frozen_and_unchanged() -> None:
    base = tiny.llama()
    before = copy.deepcopy(base.state_dict())
    model = tiny.adapt(base, CONFIG)
    after = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p.requires_grad == (".experts." in name or ".router." in name) for name, p in model.named_parameters())


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 16 / 4), (True, 16 / 2)])
def test_alpha_is_divided_by_the_rank_that_the_router_names(use_rslora: bool, expected: float) -> None:
    # SMoRA: the ranks in use, 4 of 8.
    experts = {"r": 8, "lora_alpha": 16, "use_rslora": use_rslora}
    layer = routed_layers(tiny.adapt(tiny.llama(), {**CONFIG, "experts": experts}))[0]
    assert layer.experts.scale.shape == (8,) and (layer.experts.scale == expected).all()


def test_two_adapted_models_know_nothing_of_each_other() -> None:
    one, two = tiny.adapted("llama", losses={"z": 1.0}), tiny.adapted("llama", "meteora")
    assert type(one) is not type(two) and one.moelora.port is not two.moelora.port
    expected = two(**tiny.batch()).logits
    with moelora.disabled(one):
        assert torch.equal(two(**tiny.batch()).logits, expected)


def test_adapting_twice_is_refused() -> None:
    model = tiny.adapt(tiny.llama(), CONFIG)
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match="has experts already"):
        moelora.adapt(model, CONFIG)
    assert list(model.state_dict()) == keys


def test_a_fault_at_a_later_layer_leaves_the_model_untouched(tmp_path: Path) -> None:
    # A router that cannot serve the width of one layer is only found out when that layer comes.
    plugin = tmp_path / "narrow.py"
    plugin.write_text(
        "from moelora.core.errors import ConfigError\n"
        "from moelora.routers.single import Single\n\n\n"
        "class Narrow(Single):\n"
        "    def __init__(self, site, num_experts, r):\n"
        "        super().__init__(site, num_experts, r)\n"
        "        if site.in_features > 32:\n"
        "            raise ConfigError(f'{site.name} is too wide')\n"
    )
    model = tiny.llama()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj is too wide"):
        moelora.adapt(model, {"router": "narrow"}, plugins=[plugin], verbose=False)
    assert type(model) is cls and not isinstance(model, RoutedModel) and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = moelora.adapt(tiny.llama(), {**CONFIG, "target_modules": "all-linear"})
    shown = capsys.readouterr().out
    for words in ("q_proj", "down_proj", "40 -> 32", "SMoRA", "1 x r=8"):
        assert words in shown
    trains, total = parameter_counts(model)
    assert f"trainable {trains:,} of {total:,} parameters" in shown
    assert trains == sum(p.numel() for p in tiny.trainable(model).values())
    tiny.adapt(tiny.llama(), CONFIG)
    assert capsys.readouterr().out == ""


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def test_fingerprint_is_that_of_the_weights() -> None:
    own = fingerprint(tiny.llama(), NAMES)
    assert own == fingerprint(tiny.llama(), NAMES) and own != fingerprint(tiny.llama(seed=1), NAMES)
    assert own != fingerprint(tiny.llama(), NAMES[:1])
    other = tiny.llama()
    other.model.layers[1].mlp.down_proj.weight.data += 0.1
    assert own != fingerprint(other, NAMES)


def test_fingerprint_does_not_depend_on_the_precision() -> None:
    base = tiny.llama(dtype=torch.bfloat16)
    assert len({fingerprint(base.to(d), NAMES) for d in (torch.bfloat16, torch.float32, torch.float64)}) == 1


def test_fingerprint_of_weights_that_are_not_there() -> None:
    assert fingerprint(tiny.llama().to("meta"), NAMES) is None


@pytest.mark.parametrize("name", ["adapt", "load", "save", "disabled", "collect", "AdapterConfig"])
def test_public_names(name: str) -> None:
    assert name in moelora.__all__ and getattr(moelora, name).__name__ == name


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'adpt'"):
        _ = moelora.adpt


def test_an_unfrozen_bias_of_the_base_stays_frozen_after_a_cast() -> None:
    model: Any = tiny.adapt(tiny.gpt2(), {**CONFIG, "target_modules": ["c_attn"]}).to(torch.bfloat16)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name)
