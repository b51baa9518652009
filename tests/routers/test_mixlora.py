"""MixLoRA: experts around a whole feed-forward block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Phi3Config, Phi3ForCausalLM

import moelora
from moelora.core.errors import AdapterError, ConfigError, TargetError
from moelora.eval.routing import RoutingStats
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from tests import tiny
from tests.adapters import peft_folder

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = {"router": {"attention": "lora"}, "target_modules": "all-linear"}
BLOCKS = {"llama": FFN, "gpt2": ["c_fc", "mlp.c_proj"], "t5": ["wi", "wo"]}


def mixed(kind: str = "llama", E: int = 4, r: int = 2, **more: Any) -> Any:
    model = more.pop("model", None) or tiny.MODELS[kind](0, torch.float64)
    options = more.pop("router", {})
    config = {
        "router": {"name": "mixlora", **options},
        "experts": {"num_experts": E, "r": r, "lora_alpha": 8, **more.pop("experts", {})},
        "target_modules": BLOCKS[kind],
        **more,
    }
    return tiny.shake(tiny.adapt(model, config))


def oracle(mlp: Any, x: Tensor, k: int, W: dict[str, Tensor]) -> Tensor:
    """The block token by token and expert by expert, every frozen product repeated as the formula has it."""

    def projection(name: str, e: int, x: Tensor) -> Tensor:
        layer = getattr(mlp, name)
        own = slice(e * layer.experts.r, (e + 1) * layer.experts.r)
        delta = W[f"{name}.B"][:, own] @ (W[f"{name}.A"][own] @ x)
        return layer.base_layer.weight @ x + layer.experts.scale[0].double() * delta

    rows = []
    for token in x:
        p = (W["Wg"] @ token).softmax(-1)
        chosen = sorted(range(len(p)), key=lambda e, p=p: (-p[e].item(), e))[:k]
        y = torch.zeros_like(token)
        for e in chosen:
            inside = F.silu(projection("gate_proj", e, token)) * projection("up_proj", e, token)
            y = y + p[e] / sum(p[c] for c in chosen) * projection("down_proj", e, inside)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equals_the_formula(k: int) -> None:
    model = mixed(router={"top_k": k})
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, tiny.HIDDEN, dtype=torch.float64)
    mine = x.clone().requires_grad_()
    with model.moelora.port.on(_tape()):
        y = mlp(mine)
    upstream = torch.randn(y.shape, dtype=torch.float64)
    y.backward(upstream)

    names = ["gate_proj", "up_proj", "down_proj"]
    live = {
        f"{name}.{half}": getattr(mlp, name).experts.get_parameter(f"lora_{half}") for name in names for half in "AB"
    }
    live["Wg"] = mlp.gate_proj.router.weight
    copies = {name: p.detach().clone().requires_grad_() for name, p in live.items()}
    theirs = x.reshape(-1, tiny.HIDDEN).clone().requires_grad_()
    expected = oracle(mlp, theirs, k, copies)
    expected.backward(upstream.reshape(expected.shape))
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y.reshape(expected.shape), expected, **close)
    torch.testing.assert_close(mine.grad.reshape(theirs.shape), theirs.grad, **close)
    for name, p in live.items():
        torch.testing.assert_close(p.grad, copies[name].grad, **close, msg=lambda m, name=name: f"{name}: {m}")


def _tape() -> Any:
    from moelora.core.tape import Tape

    return Tape()


@pytest.mark.parametrize("kind", BLOCKS)
def test_zero_up_factors_are_the_base(kind: str) -> None:
    base, model = tiny.MODELS[kind](0, torch.float64), mixed(kind)
    for layer in routed_layers(model):
        layer.experts.lora_B.data.zero_()
    given = tiny.batch(kind)
    torch.testing.assert_close(model(**given).logits, base(**given).logits, rtol=1e-11, atol=1e-11)
    with moelora.disabled(model):
        assert torch.equal(model(**given).logits, base(**given).logits)


@pytest.mark.parametrize("kind", BLOCKS)
def test_one_expert_is_plain_lora_on_the_block(kind: str) -> None:
    model = mixed(kind, E=1, router={"top_k": 1})
    single = {"router": "single", "experts": {"r": 2, "lora_alpha": 8}, "target_modules": BLOCKS[kind]}
    plain = tiny.adapt(tiny.MODELS[kind](0, torch.float64), single)
    for one, two in zip(routed_layers(plain), routed_layers(model), strict=True):
        one.experts.load_state_dict(two.experts.state_dict())
    given = tiny.batch(kind)
    torch.testing.assert_close(model(**given).logits, plain(**given).logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", BLOCKS)
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    model = mixed(kind, losses={"balance": 0.1})
    model(**tiny.batch(kind)).loss.backward()
    first = tiny.gradients(model)
    model.zero_grad()
    tiny.checkpointing(model)(**tiny.batch(kind)).loss.backward()
    tiny.assert_same(first, tiny.gradients(model))


def test_frozen_products_are_computed_once_per_token() -> None:
    model = mixed(router={"top_k": 3})
    rows: list[int] = []
    for layer in routed_layers(model):
        layer.base_layer.register_forward_pre_hook(
            lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1]).shape[0])
        )
    given = tiny.batch(padded=False)
    model(**given)
    assert rows == [given["input_ids"].numel()] * 6


def test_one_router_and_one_route_per_block() -> None:
    model = mixed()
    assert len({id(layer.router) for layer in routed_layers(model)}) == 2
    assert len(tiny.routes(model, **tiny.batch())) == 2
    assert not model.moelora.port.tape


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_changes_nothing(kind: str) -> None:
    model = mixed(kind).eval()
    given = {**tiny.unlabelled(tiny.batch(kind, padded=False)), "max_new_tokens": 8, "min_new_tokens": 8}
    cached = model.generate(**given, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(**given, do_sample=False, use_cache=False))


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = mixed().eval()
    moelora.save(model, tmp_path)
    again = moelora.load(tiny.llama(0, torch.float64), tmp_path).eval()
    given = tiny.unlabelled(tiny.batch())
    assert torch.equal(again(**given).logits, model(**given).logits)


def test_jitter_moves_the_choice_in_training_only() -> None:
    model = mixed(router={"jitter": 0.5})
    given = tiny.batch()
    first, second = (tiny.routes(model, **given)[0].logits for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(*(tiny.routes(model, **given)[0].logits for _ in range(2)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate_proj", "down_proj"], r"missing: \['model.layers.0.mlp.up_proj'\]"),
        (["q_proj"], "'model.layers.0.self_attn.q_proj' is not part of a feed-forward block"),
        ("all-linear", "is not part of a feed-forward block.*attention may have a LoRA beside them: .*attention: lora"),
    ],
)
def test_anything_but_whole_blocks_is_refused(targets: Any, message: str) -> None:
    model = tiny.llama()
    with pytest.raises(TargetError, match=message):
        moelora.adapt(model, {"router": "mixlora", "experts": {"num_experts": 4}, "target_modules": targets})
    assert all(p.requires_grad for p in model.parameters())


def test_experts_that_share_a_factor_are_refused() -> None:
    with pytest.raises(ConfigError, match="experts with an A of their own"):
        tiny.adapt(tiny.llama(), {"router": "mixlora", "experts": {"name": "core", "num_experts": 4}})


# Plain LoRAs in attention, beside the blocks


@pytest.mark.parametrize("kind", BLOCKS)
def test_attention_has_one_lora_that_is_always_on(kind: str) -> None:
    """As if it were in the weights of attention; losses are of the blocks alone, each as often as before."""
    losses = {"balance": 0.1, "z": 0.1}
    model, base = mixed(kind, **ATTENTION, losses=losses), tiny.MODELS[kind](0, torch.float64)
    layers = {layer.site.name: layer for layer in routed_layers(model)}
    beside = [
        layer for layer in layers.values() if layer.site.parent.rpartition(".")[2] not in ("mlp", "DenseReluDense")
    ]
    for layer in beside:
        update = 4 * layer.experts.lora_B @ layer.experts.lora_A
        weight = base.get_submodule(layer.site.name).weight
        weight.data += update.t() if kind == "gpt2" else update
    merged = mixed(kind, model=base, losses=losses)
    for layer in routed_layers(merged):
        for part in ("experts", "router"):
            getattr(layer, part).load_state_dict(getattr(layers[layer.site.name], part).state_dict())
    assert len(beside) + len(routed_layers(merged)) == len(layers)
    found, expected = (one(**tiny.batch(kind)) for one in (model, merged))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-10)


def test_only_blocks_have_statistics() -> None:
    model, stats = mixed(**ATTENTION), RoutingStats(["all"])
    with moelora.collect(model, stats):
        model(**tiny.batch())
    assert list(stats.layers) == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]


def test_numbers_of_experts_are_for_blocks_and_the_first_expert_holds_attention(tmp_path: Path) -> None:
    model = mixed(**ATTENTION, experts={"num_experts": [2, 3]})
    numbers = {layer.site.name: layer.experts.num_experts for layer in routed_layers(model)}
    for name, number in numbers.items():
        assert number == (1 if "self_attn" in name else 2 if ".0." in name else 3)
    moelora.save(model, tmp_path)
    for index in range(3):
        halves = load_file(tmp_path / "experts" / f"expert_{index}" / "adapter_model.safetensors")
        held = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in halves}
        assert held == {name for name, number in numbers.items() if index < number}
    assert "The first holds the LoRAs of attention" in (tmp_path / "README.md").read_text()
    again = moelora.load(tiny.llama(0, torch.float64), tmp_path)
    tiny.assert_same(adapter_tensors(again), adapter_tensors(model))


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("llama", ["q_proj", "gate_proj", "down_proj"], r"missing: \['model.layers.0.mlp.up_proj'\]"),
        (
            "llama",
            ["q_proj", "v_proj"],
            "leaves all 4 targets to plain LoRAs, such as 'model.layers.0.self_attn.q_proj'",
        ),
        ("bert", ["query", "dense"], "'bert.encoder.layer.0.intermediate.dense' is not part of a feed-forward block"),
        ("mamba", ["in_proj"], "'backbone.layers.0.mixer.in_proj' is not part of a feed-forward block"),
        ("phi3", "all-linear", "'model.layers.0.mlp.gate_up_proj' is not part of a feed-forward block"),
    ],
)
def test_what_is_neither_a_block_nor_attention_gets_no_lora_in_silence(kind: str, targets: Any, message: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 1}
    phi3 = Phi3ForCausalLM(Phi3Config(vocab_size=64, pad_token_id=0, **shape))
    model = {"llama": tiny.llama(), "bert": tiny.bert(), "mamba": tiny.mamba(), "phi3": phi3}[kind]
    router = {"name": "mixlora", "attention": "lora"}
    with pytest.raises(TargetError, match=message):
        moelora.adapt(model, {"router": router, "experts": {"num_experts": 4}, "target_modules": targets})
    assert all(p.requires_grad for p in model.parameters())


def started(tmp_path: Path, *targets: list[str], **first: Any) -> Any:
    """A model whose experts start from one PEFT adapter each, the first with more options."""
    folders = [
        peft_folder(tmp_path / f"a{i}", seed=i, target_modules=names, **({} if i else first))
        for i, names in enumerate(targets)
    ]
    experts = {"num_experts": len(folders), "r": 4, "adapters": [str(folder) for folder in folders], "train": "none"}
    router = {"name": "mixlora", "attention": "lora"}
    return tiny.adapt(tiny.llama(), {"router": router, "experts": experts, "target_modules": ["q_proj", *FFN]})


def test_attention_starts_from_the_first_adapter(tmp_path: Path) -> None:
    layer = started(tmp_path, [*FFN, "q_proj"], FFN).model.layers[1].self_attn.q_proj
    halves, name = load_file(tmp_path / "a0" / "adapter_model.safetensors"), f"base_model.model.{layer.site.name}.lora_"
    assert torch.equal(layer.experts.lora_A, halves[f"{name}A.weight"])
    assert torch.equal(layer.experts.lora_B, halves[f"{name}B.weight"]) and layer.experts.scale.unique() == 2


def test_a_saved_mixture_is_a_start_with_its_attention(tmp_path: Path) -> None:
    model = mixed(**ATTENTION)
    moelora.save(model, tmp_path)
    again = mixed(**ATTENTION, experts={"adapters": [str(tmp_path)]})
    for one, two in zip(routed_layers(model), routed_layers(again), strict=True):
        tiny.assert_same(one.experts.state_dict(), two.experts.state_dict())


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["q_proj"], ["q_proj"], "found one in .*a0, .*a1; choose a router with experts there too"),
        ([], ["q_proj"], "the first adapter's; found one in .*a1; choose"),
        ([], [], "found one in none; leave q_proj out of target_modules"),
    ],
)
def test_attention_is_the_first_adapters_and_no_others(
    first: list[str], second: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="q_proj' has one LoRA for all experts.*" + message):
        started(tmp_path, [*FFN, *first], [*FFN, *second])


def test_dora_in_attention_does_not_hide_dora_in_a_block(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="DoRA can only be an expert of experts: lora, beside single layers"):
        started(tmp_path, [*FFN, "q_proj"], FFN, use_dora=True)
