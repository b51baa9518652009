"""Adapters that cannot be experts of a model: refused by name, and the model is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moelora
from moelora.core.errors import AdapterError, MoeloraError
from moelora.io.peft import CONFIG, PREFIX, WEIGHTS
from moelora.model.layer import RoutedLinear
from moelora.model.record import routed_layers
from moelora.model.routed import RoutedModel
from tests import tiny
from tests.adapters import base, choose, logits, mixture, mixture_config, peft_folder, peft_logits

Q0 = "model.layers.0.self_attn.q_proj"
DORA, OWN_BIAS, BASE_BIAS = {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}


def refused(folders: list[Path], kind: str = "qwen", model: Any = None, r: int = 4, **more: Any) -> str:
    """The message. Nothing of the model has changed: no layer, no value, no flag."""
    model = base(kind) if model is None else model
    model.get_input_embeddings().requires_grad_(False)
    modules, flags = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    values, kinds = {n: p.clone() for n, p in model.state_dict().items()}, [type(m) for m in model.modules()]
    identities = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(AdapterError) as caught:
        tiny.adapt(model, mixture_config(folders, kind, r, **more))
    assert all(modules[name] is module for name, module in model.named_modules()) and len(modules) == len(kinds)
    assert [type(module) for module in model.modules()] == kinds and not hasattr(model, "moelora")
    assert not any(isinstance(module, RoutedLinear | RoutedModel) for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    if not any(value.device.type == "meta" for value in values.values()):
        tiny.assert_same(model.state_dict(), values)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


# More than LoRA, where only LoRA can be


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (DORA, "DoRA"),
        (OWN_BIAS, "lora_bias"),
        (BASE_BIAS, "trained biases"),
        ({**DORA, **BASE_BIAS}, "DoRA and trained biases"),
    ],
)
@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            {"experts": {"train": "all"}},
            "only be a frozen expert; set experts.train to none, or leave this adapter out",
        ),
        ({"experts": {"train": "B"}}, "only be a frozen expert; set experts.train to none, or leave this adapter out"),
        (
            {"experts": {"name": "core"}},
            "only be an expert of experts: lora, beside single layers; found experts: core",
        ),
        (
            {"experts": {"name": "merged"}, "router": "smear"},
            "only be an expert of experts: lora.*; found experts: merged",
        ),
    ],
)
def test_more_than_lora(options: Any, what: str, more: Any, why: str, tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "plain", "qwen"), peft_folder(tmp_path / "odd", "qwen", **options)]
    message = refused(folders, **more)
    assert message.startswith(f"{folders[1]}: {what} can ") and why.partition(".*")[0] in message
    assert why.rpartition(".*")[2] in message


def test_dora_around_a_feed_forward_block(tmp_path: Path) -> None:
    names = ["gate_proj", "up_proj", "down_proj"]
    folders = [peft_folder(tmp_path / str(i), seed=i, target_modules=names, use_dora=bool(i)) for i in range(2)]
    message = refused(folders, "llama", router="mixlora", target_modules=names)
    assert message.startswith(f"{folders[1]}: DoRA can only be an expert of experts: lora, beside single layers")
    mixture(
        [folders[0], peft_folder(tmp_path / "c", seed=3, target_modules=names)], router="mixlora", target_modules=names
    )


def test_experts_that_share_a_half(tmp_path: Path) -> None:
    message = refused([peft_folder(tmp_path / "a", "qwen")], experts={"name": "hydra"}, router="softmax")
    assert "experts.adapters: experts 'hydra' cannot start from LoRA adapters" in message


# Not of this model


def test_a_layer_that_is_not_adapted_here(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, "qwen", target_modules=["q_proj", "k_proj"])
    assert (
        f"{folder}: it adapts 'model.layers.0.self_attn.k_proj' (2 such modules), which is not an adapted layer "
        in refused([folder])
    )


@pytest.mark.parametrize("inner", ["model.", "base_model.model."])
def test_names_of_another_class_of_model(inner: str, tmp_path: Path) -> None:
    """An adapter of LlamaModel has no ``model.`` before its paths; nothing is guessed."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            path = name.removeprefix(PREFIX)
            tensors[f"{PREFIX}{path.removeprefix('model.') if inner == 'model.' else inner + path}"] = tensors.pop(name)

    message = refused([rewrite(peft_folder(tmp_path, "qwen"), rename)])
    assert "and Qwen2ForCausalLM has no such module" in message and "by the class it was trained with" in message
    assert "did you mean" in message and "model.layers.0.self_attn.o_proj" in message


def test_a_layer_of_another_size(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    message = refused([folder], "llama", model=tiny.llama(intermediate_size=48))
    assert f"{folder}: made for a 'model.layers.0.mlp.down_proj' of 40 -> 32 features, here it has 48 -> 32" in message


def test_a_transposed_conv1d(tmp_path: Path) -> None:
    """What a loader that swaps GPT-2's halves would have written: square layers hide it, c_fc does not."""

    def transpose(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            tensors[name], tensors[other] = tensors[other].t(), tensors[name].t()

    message = refused([rewrite(peft_folder(tmp_path, "gpt2"), transpose)], "gpt2")
    assert "made for a 'transformer.h.0.attn.c_attn' of 96 -> 32 features, here it has 32 -> 96" in message


def test_a_bias_where_the_model_has_none(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, "qwen", target_modules=["q_proj"], **BASE_BIAS)
    message = refused([folder], "llama")
    assert f"{PREFIX}{Q0}.base_layer.bias: found a bias, expected none, as '{Q0}' has none" in message


def test_modules_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    folder = edit(peft_folder(tmp_path, "qwen"), target_modules=["q_proj", "o_proj"])
    message = refused([folder])
    assert (
        f"{folder}: tensors for 'model.layers.0.self_attn.v_proj' (2 such modules), which its target_modules do"
        in message
    )


def test_modules_that_have_no_tensors(tmp_path: Path) -> None:
    folder = edit(peft_folder(tmp_path, "qwen"), target_modules=["q_proj", "o_proj", "v_proj", "up_proj"])
    assert f"{folder}: no tensors for 'model.layers.0.mlp.up_proj' (2 such modules), which" in refused([folder])


def test_one_half_lost(tmp_path: Path) -> None:
    folder = rewrite(peft_folder(tmp_path, "qwen"), lambda tensors: tensors.pop(f"{PREFIX}{Q0}.lora_A.weight"))
    assert f"{PREFIX}{Q0}.lora_B.weight: found no lora_A beside it" in refused([folder])


@pytest.mark.parametrize("what", ["lora_magnitude_vector", "lora_B.bias", "base_layer.bias"])
def test_a_vector_lost_of_one_layer(what: str, tmp_path: Path) -> None:
    """o_proj has no bias, so that none is missed there."""
    options = {"lora_magnitude_vector": DORA, "lora_B.bias": OWN_BIAS, "base_layer.bias": BASE_BIAS}[what]
    folder = rewrite(peft_folder(tmp_path, "qwen", **options), lambda tensors: tensors.pop(f"{PREFIX}{Q0}.{what}"))
    assert Q0 in refused([folder])


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_in_a_late_layer(part: str, value: float, tmp_path: Path) -> None:
    """Found after other layers have been filled already."""
    name = f"{PREFIX}model.layers.1.self_attn.v_proj.{part}"
    folder = rewrite(peft_folder(tmp_path, "qwen", **DORA, **BASE_BIAS), lambda t: t[name].view(-1)[-1].fill_(value))
    message = refused([folder])
    assert name in message and "NaN" in message


# Not of this recipe


def test_ranks_above_r(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / name, r=r, seed=r) for name, r in (("a", 2), ("b", 8), ("c", 5))]
    assert f"{folders[1]}: rank 8, but r is 4 here; set experts.r to 8" in refused(folders, "llama")
    moved = peft_folder(tmp_path / "d", init_lora_weights="pissa")
    assert f"{moved}: rank 8 (pissa doubles it), but r is 7 here; set experts.r to 8" in refused([moved], "llama", r=7)


@pytest.mark.parametrize("count", [1, 3, [2, 1], [1, 2]])
def test_another_number_of_experts(count: Any, tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    message = refused(folders, "llama", experts={"num_experts": count}, router={"name": "softmax"})
    assert f"experts.adapters: 2 experts in {folders[0]}, {folders[1]}, but num_experts is " in message


def test_experts_by_depth(tmp_path: Path) -> None:
    """The second adapter has no layer where there is one expert only."""
    folders = [peft_folder(tmp_path / "a"), peft_folder(tmp_path / "b", seed=1, layers_to_transform=[1])]
    model = mixture(folders, experts={"num_experts": [1, 2]})
    assert [layer.experts.num_experts for layer in routed_layers(model)] == [1, 1, 1, 2, 2, 2]
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.router.theta.zero_()[layer.experts.num_experts - 1] = float(layer.experts.num_experts == 2)
    torch.testing.assert_close(logits(model, "llama"), peft_logits(folders[1]), rtol=5e-6, atol=5e-6)


def test_the_same_adapter_twice(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    (tmp_path / "link").symlink_to(folder)
    for other in (folder, tmp_path / "b" / ".." / "a", tmp_path / "link"):
        (tmp_path / "b").mkdir(exist_ok=True)
        assert "twice" in refused([folder, other], "llama")
    mixture([folder, folder], experts={"train": "all"})


def test_no_adapter_at_all(tmp_path: Path) -> None:
    assert "no adapter here" in refused([tmp_path], "llama")


# Weights that are not there


def test_a_base_model_without_weights(tmp_path: Path) -> None:
    """On the meta device plain LoRA and lora_bias are read; what is computed from the base weights is refused."""
    plain, own = peft_folder(tmp_path / "a", "qwen"), peft_folder(tmp_path / "b", "qwen", seed=1, **OWN_BIAS)
    made = mixture([plain, own], "qwen", model=base("qwen").to("meta"))
    assert all(parameter.is_meta for parameter in made.parameters())
    mixture([peft_folder(tmp_path / "g", "gpt2")], "gpt2", model=base("gpt2").to("meta"))
    for name, options in {"dora": DORA, "bias": BASE_BIAS, "pissa": {"init_lora_weights": "pissa", "r": 2}}.items():
        folder = peft_folder(tmp_path / name, "qwen", **options)
        message = refused([plain, folder], model=base("qwen").to("meta"))
        assert message.startswith(f"{folder}: DoRA, PiSSA, OLoRA and trained biases need the base model's weights")
        assert "'model.layers." in message


def test_weights_that_are_partitioned(tmp_path: Path) -> None:
    """DeepSpeed ZeRO-3 leaves empty tensors in their place."""
    folder, model = peft_folder(tmp_path / "a", "qwen", **DORA), base("qwen")
    layer = model.get_submodule("model.layers.1.self_attn.o_proj")
    layer.weight.data = torch.empty(0)
    assert "'model.layers.1.self_attn.o_proj' has none; load them first" in refused([folder], model=model)


# In loading what was saved


def test_a_saved_mixture_on_another_base(tmp_path: Path) -> None:
    """With force, experts that are made of the base weights are made of the new ones, as PEFT would."""
    folder = peft_folder(tmp_path / "a", "qwen", **DORA)
    moelora.save(mixture([folder], "qwen"), tmp_path / "out")
    other, before = base("qwen", seed=7), base("qwen", seed=7)
    with pytest.raises(MoeloraError, match="made for the weights of"):
        moelora.load(other, tmp_path / "out")
    tiny.assert_same(other.state_dict(), before.state_dict())
    forced = choose(moelora.load(other, tmp_path / "out", force=True).eval(), 1.0)
    expected = peft_logits(folder, "qwen", before)
    torch.testing.assert_close(logits(forced, "qwen"), expected, rtol=5e-6, atol=5e-6)
