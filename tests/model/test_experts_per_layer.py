"""Another number of experts at every depth (MoLA): sizes, saving, one PEFT folder per expert, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moelora
from moelora.core.errors import AdapterError, ConfigError
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from tests import tiny


def deep(counts: Any, seed: int = 0, router: Any = "softmax", **experts: Any) -> Any:
    """A llama of four blocks."""
    own = {"num_experts": counts, "r": 4, "lora_alpha": 8, **experts}
    config = {"router": router, "experts": own, "target_modules": tiny.TARGETS["llama"]}
    return tiny.shake(tiny.adapt(base(), config, seed), seed=seed)


def base() -> Any:
    return tiny.llama(num_hidden_layers=4)


@pytest.mark.parametrize(
    ("counts", "by_block"),
    [([1, 2, 3, 4], [1, 2, 3, 4]), ([2, 5], [2, 2, 5, 5]), ([3], [3, 3, 3, 3]), ([4, 1], [4, 4, 1, 1])],
)
def test_every_group_of_blocks_has_its_number(counts: list[int], by_block: list[int]) -> None:
    model = deep(counts)
    for layer in routed_layers(model):
        number = by_block[int(layer.site.name.split(".")[2])]
        assert layer.experts.num_experts == layer.router.num_experts == number
        assert layer.experts.lora_A.shape == (4 * number, layer.in_features)
        assert layer.experts.lora_B.shape == (layer.out_features, 4 * number)
        assert layer.router.weight.shape == (number, layer.in_features)
    for layer, route in zip(routed_layers(model), tiny.routes(model, **tiny.batch()), strict=True):
        assert route.units == layer.experts.num_experts
    model(**tiny.batch()).loss.backward()
    tiny.gradients(model)


def test_equal_numbers_in_a_list_are_one_number() -> None:
    batch = tiny.batch()
    assert torch.equal(deep([3, 3])(**batch).logits, deep(3)(**batch).logits)


@pytest.mark.parametrize("counts", [[1, 2, 3, 4], [3, 1]])
def test_saved_and_loaded_bit_for_bit(counts: list[int], tmp_path: Path) -> None:
    model = deep(counts)
    moelora.save(model, tmp_path)
    again = moelora.load(base(), tmp_path)
    assert again.moelora.config.experts.num_experts == counts
    tiny.assert_same(adapter_tensors(again), adapter_tensors(model))
    batch = tiny.batch()
    assert torch.equal(again.train()(**batch).logits, model(**batch).logits)


def test_the_folder_of_an_expert_has_the_layers_it_is_in(tmp_path: Path) -> None:
    model = deep([1, 3])
    moelora.save(model, tmp_path)
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == ["expert_0", "expert_1", "expert_2"]
    for e in range(3):
        folder = tmp_path / "experts" / f"expert_{e}"
        tensors = load_file(folder / "adapter_model.safetensors")
        layers = [layer for layer in routed_layers(model) if layer.experts.num_experts > e]
        names = {layer.site.name for layer in layers}
        assert set(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == names
        assert {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors} == names
        for layer in layers:
            own, start = slice(4 * e, 4 * e + 4), f"base_model.model.{layer.site.name}.lora_"
            assert torch.equal(tensors[f"{start}A.weight"], layer.experts.lora_A[own])
            assert torch.equal(tensors[f"{start}B.weight"], layer.experts.lora_B[:, own])
    assert len(names) == len(routed_layers(model)) / 2


def test_peft_reads_the_folder_of_a_deep_expert(tmp_path: Path) -> None:
    from peft import PeftModel

    model = deep([1, 3])
    moelora.save(model, tmp_path)
    alone = PeftModel.from_pretrained(base(), tmp_path / "experts" / "expert_2")
    with torch.no_grad():
        for layer in routed_layers(model):  # this expert alone, always on
            kept = layer.experts.lora_B[:, 8:] * (3 if layer.experts.num_experts == 3 else 1)
            layer.experts.lora_B.zero_()[:, 8:] = kept
            layer.router.weight.zero_()
    batch = tiny.unlabelled(tiny.batch())
    torch.testing.assert_close(model.eval()(**batch).logits, alone.eval()(**batch).logits, rtol=1e-4, atol=1e-4)


def test_experts_start_from_adapters_of_the_same_list(tmp_path: Path) -> None:
    trained = deep([1, 3], seed=3)
    moelora.save(trained, tmp_path)
    experts = {"num_experts": [1, 3], "r": 4, "lora_alpha": 8, "adapters": [str(tmp_path)]}
    config = {"router": "uniform", "experts": experts, "target_modules": tiny.TARGETS["llama"]}
    model = tiny.adapt(base(), config)
    for one, two in zip(routed_layers(trained), routed_layers(model), strict=True):
        tiny.assert_same(dict(one.experts.named_parameters()), dict(two.experts.named_parameters()))
    with pytest.raises(AdapterError, match=r"3 experts in .*num_experts is 1 at 'model\.layers\.2\.self_attn\.q_proj'"):
        tiny.adapt(base(), {**config, "experts": {**experts, "num_experts": [3, 1]}})


@pytest.mark.parametrize("experts", ["hydra", "merged", "core"])
def test_other_parameterisations_take_a_list_too(experts: str, tmp_path: Path) -> None:
    model = deep([2, 4], name=experts)
    moelora.save(model, tmp_path)
    again = moelora.load(base(), tmp_path)
    tiny.assert_same(adapter_tensors(again), adapter_tensors(model))


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            "llama",
            {"experts": {"num_experts": [1, 2, 3]}},
            r"3 numbers for equal groups of blocks, but .* has 2 blocks",
        ),
        ("llama", {"experts": {"num_experts": []}}, "experts.num_experts.*at least 1"),
        ("llama", {"experts": {"num_experts": [2, 0]}}, r"experts.num_experts.*greater than or equal to 1"),
        ("llama", {"experts": {"num_experts": [1, 2]}, "router": "meteora"}, "top_k 2 is more than the 1 experts"),
        ("bert", {"experts": {"num_experts": [1, 2]}}, "2 numbers for .*pooler.dense' lies in no block"),
    ],
)
def test_lists_that_do_not_fit_leave_the_model_alone(kind: str, config: dict[str, Any], message: str) -> None:
    model = tiny.MODELS[kind]()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ConfigError, match=message):
        tiny.adapt(model, {"router": "softmax", "target_modules": tiny.TARGETS[kind], **config})
    assert type(model) is cls and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_one_router_for_layers_of_different_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="router 'xlora' is one for several layers, which need as many experts"):
        deep([1, 2], router="xlora")
