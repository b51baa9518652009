"""Folders of MixLoRA and MoE-PEFT, against their formulas.

Layout and formulas were read from TUDB-Labs/MoE-PEFT at 40f8cb7 (``moe_peft/model.py``: get_lora_layer_weight;
``moe_peft/trainer.py``: save_adapter_weight; ``moe_peft/adapters/{mixlora,mola,loramoe}``: export and forward) and
TUDB-Labs/MixLoRA at d59d09b (``mixlora/model.py``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM, PhiConfig, PhiForCausalLM

import moelora
from moelora.core.errors import AdapterError, ConfigError
from moelora.tools.mixtures import import_mixture
from tests import tiny

E, R, ALPHA = 3, 2, 5
FFN = ["gate_proj", "up_proj", "down_proj"]
TEMPLATE = ["q_proj", "k_proj", "v_proj", "o_proj", *FFN]
"""The targets of MoE-PEFT's templates/mixlora.json."""


def phi(seed: int = 0, **options: Any) -> Any:
    """A block without a gate, with biases."""
    shape = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "intermediate_size": 40, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "resid_pdrop": 0.0, "hidden_act": "gelu_new", "pad_token_id": 0, **options}
    return tiny._seeded(PhiForCausalLM, PhiConfig(**shape, **more, **tiny.SMALL_INIT), seed, torch.float32)


BASES = {"llama": tiny.llama, "phi": phi}


def folder_of(
    path: Path, kind: str = "mixlora", targets: list[str] | None = None, base: Any = None, **more: Any
) -> Path:
    """What MoE-PEFT saves, but as safetensors."""
    targets = targets or FFN
    model = tiny.llama() if base is None else base
    inner = more.get("expert_lora") or {}
    outer = more.get("r", R)
    r, made, state = inner.get("r", outer), torch.Generator().manual_seed(7), {}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made) * 0.3

    for index, block in enumerate(model.model.layers):
        for part in ("mlp", "self_attn"):
            prefix = f"{kind}.layers.{index}.{part}"
            if kind == "mixlora" and part == "mlp":
                state[f"{prefix}.moe_gate.weight"] = random(E, tiny.HIDDEN)
            for name, layer in getattr(block, part).named_children():
                if name not in targets:
                    continue
                if part == "self_attn" and kind != "mola":
                    state[f"{prefix}.{name}.lora_A.weight"] = random(outer, layer.in_features)
                    state[f"{prefix}.{name}.lora_B.weight"] = random(layer.out_features, outer)
                    continue
                if kind != "mixlora":
                    state[f"{prefix}.{name}.moe_gate.weight"] = random(E, layer.in_features)
                for e in range(E):
                    state[f"{prefix}.{name}.experts.{e}.lora_A.weight"] = random(r, layer.in_features)
                    state[f"{prefix}.{name}.experts.{e}.lora_B.weight"] = random(layer.out_features, r)
    settings = {
        "bias": "none", "peft_type": kind.upper(), "r": R, "lora_alpha": ALPHA, "lora_dropout": 0.05,
        "target_modules": targets, "routing_strategy": kind, "num_experts": E, "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "", **({} if kind == "loramoe" else {"top_k": 2}),
        **({"act_fn": model.config.hidden_act} if kind == "mixlora" else {}), **more,
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(state, path / "adapter_model.safetensors")
    return path


@torch.no_grad()
def oracle(path: Path, kind: str, base: Any) -> Tensor:
    """Logits of the formulas, token by token and expert by expert."""
    settings = json.loads((path / "adapter_config.json").read_text())
    state = load_file(path / "adapter_model.safetensors")
    scale, beside = (
        own["lora_alpha"] / (own["r"] ** 0.5 if own.get("use_rslora") else own["r"])
        for own in ({**settings, **settings.get("expert_lora", {})}, settings)
    )
    k = settings.get("top_k", E)

    def gates(weight: Tensor, x: Tensor) -> dict[int, Tensor]:
        p = (weight @ x).softmax(0)
        chosen = p.topk(k).indices.tolist()
        return {e: p[e] / sum(p[i] for i in chosen) for e in chosen}

    def adapted(layer: nn.Linear, prefix: str, e: int, x: Tensor) -> Tensor:
        y = layer(x)
        if f"{prefix}.experts.{e}.lora_A.weight" in state:
            A, B = (state[f"{prefix}.experts.{e}.lora_{half}.weight"] for half in "AB")
            y = y + scale * (B @ (A @ x))
        return y

    def each_token(compute: Any) -> Any:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            return torch.stack([torch.stack([compute(self, token) for token in row]) for row in x])

        return forward

    def block(prefix: str) -> Any:
        def compute(mlp: Any, x: Tensor) -> Tensor:
            out = torch.zeros(tiny.HIDDEN)
            for e, gate in gates(state[f"{prefix}.moe_gate.weight"], x).items():
                if hasattr(mlp, "gate_proj"):
                    inner = mlp.act_fn(adapted(mlp.gate_proj, f"{prefix}.gate_proj", e, x))
                    inner = inner * adapted(mlp.up_proj, f"{prefix}.up_proj", e, x)
                    out += gate * adapted(mlp.down_proj, f"{prefix}.down_proj", e, inner)
                else:
                    inner = mlp.activation_fn(adapted(mlp.fc1, f"{prefix}.fc1", e, x))
                    out += gate * adapted(mlp.fc2, f"{prefix}.fc2", e, inner)
            return out

        return compute

    def single(prefix: str) -> Any:
        def compute(layer: nn.Linear, x: Tensor) -> Tensor:
            y = nn.functional.linear(x, layer.weight, layer.bias)
            for e, gate in gates(state[f"{prefix}.moe_gate.weight"], x).items():
                A, B = (state[f"{prefix}.experts.{e}.lora_{half}.weight"] for half in "AB")
                y = y + gate * scale * (B @ (A @ x))
            return y

        return compute

    def always(prefix: str) -> Any:
        def compute(layer: nn.Linear, x: Tensor) -> Tensor:
            A, B = (state[f"{prefix}.lora_{half}.weight"] for half in "AB")
            return nn.functional.linear(x, layer.weight, layer.bias) + beside * (B @ (A @ x))

        return compute

    for index, layers in enumerate(base.model.layers):
        for part in ("mlp", "self_attn"):
            module, prefix = getattr(layers, part), f"{kind}.layers.{index}.{part}"
            if kind == "mixlora" and part == "mlp":
                module.forward = MethodType(each_token(block(prefix)), module)
            for name, layer in module.named_children():
                if f"{prefix}.{name}.moe_gate.weight" in state:
                    layer.forward = MethodType(each_token(single(f"{prefix}.{name}")), layer)
                elif f"{prefix}.{name}.lora_A.weight" in state:
                    layer.forward = MethodType(each_token(always(f"{prefix}.{name}")), layer)
    return logits(base)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**tiny.unlabelled(tiny.batch()), use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "base", "options"),
    [
        ("mixlora", "llama", {}),
        ("mixlora", "llama", {"top_k": 1, "use_rslora": True}),
        ("mixlora", "llama", {"targets": ["up_proj", "down_proj"], "top_k": 3}),
        ("mixlora", "llama", {"expert_lora": {"bias": "none", "r": 3, "lora_alpha": 4, "lora_dropout": 0.1}}),
        ("mixlora", "phi", {"targets": ["fc1", "fc2"]}),
        ("mola", "llama", {"targets": ["q_proj", "v_proj", "down_proj"]}),
        ("mola", "phi", {"targets": ["q_proj", "dense", "fc1"], "top_k": 1}),
        ("loramoe", "llama", {"targets": FFN}),
        ("mixlora", "llama", {"targets": TEMPLATE}),
        ("mixlora", "phi", {"targets": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]}),
        ("mixlora", "llama", {"targets": TEMPLATE, "use_rslora": True, "expert_lora": {"r": 3, "use_rslora": False}}),
        ("mixlora", "llama", {"targets": ["v_proj", *FFN], "r": 4, "expert_lora": {"r": 1, "lora_alpha": 7}}),
        ("loramoe", "llama", {"targets": ["q_proj", "o_proj", "down_proj"]}),
    ],
)
def test_equals_the_formulas(tmp_path: Path, kind: str, base: str, options: dict[str, Any]) -> None:
    folder = folder_of(tmp_path / "x", kind, base=BASES[base](), **options)
    model = import_mixture(BASES[base](), folder, verbose=False)
    expected = oracle(folder, kind, BASES[base]().eval())
    torch.testing.assert_close(logits(model), expected, rtol=2e-5, atol=2e-5)
    assert (logits(BASES[base]()) - expected).abs().max() > 0.05
    moelora.save(model, tmp_path / "ours")
    assert torch.equal(logits(moelora.load(BASES[base](), tmp_path / "ours")), logits(model))


def test_settings_of_training_are_kept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", router_aux_loss_coef=0.02, jitter_noise=0.1, router_init_range=0.5)
    config = import_mixture(tiny.llama(), folder, verbose=False).moelora.config
    assert config.losses["balance"]["weight"] == 0.02 and config.router == {
        "name": "mixlora",
        "top_k": 2,
        "jitter": 0.1,
        "attention": "refuse",
    }
    assert config.experts.train == "all" and config.experts.lora_dropout == 0.05
    quiet = folder_of(tmp_path / "y", router_aux_loss_coef=0.02, router_loss=False)
    assert import_mixture(tiny.llama(), quiet, verbose=False).moelora.config.losses == {}


def test_targets_may_be_switches(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", target_modules={"q_proj": False, **dict.fromkeys(FFN, True)})
    assert len(import_mixture(tiny.llama(), folder, verbose=False).moelora.sites) == 6


def test_loras_of_attention_keep_their_rank_and_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"r": 1, "lora_alpha": 7, "lora_dropout": 0.2}
    folder = folder_of(tmp_path / "x", targets=TEMPLATE, r=4, expert_lora=own)
    model = import_mixture(tiny.llama(), folder)
    assert "attention had dropout 0.05; trained on, they have the experts', 0.2" in " ".join(
        capsys.readouterr().out.split()
    )
    assert model.moelora.config.experts.r == 4 and model.moelora.config.router["attention"] == "lora"
    state = load_file(folder / "adapter_model.safetensors")
    layer, halves = model.model.layers[1].self_attn.o_proj, "mixlora.layers.1.self_attn.o_proj.lora_"
    assert torch.equal(layer.experts.lora_A, state[f"{halves}A.weight"])
    assert torch.equal(layer.experts.lora_B, state[f"{halves}B.weight"])
    assert layer.experts.ranks == [4] and (layer.experts.scale == ALPHA / 4).all()
    assert model.model.layers[1].mlp.up_proj.experts.ranks == [1] * E
    alone = folder_of(tmp_path / "y", r=4, expert_lora=own)
    assert import_mixture(tiny.llama(), alone, verbose=False).moelora.config.experts.r == 1


@pytest.mark.parametrize("targets", [FFN, TEMPLATE])
def test_it_trains_on(targets: list[str], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", targets=targets, router_aux_loss_coef=0.01)
    model = import_mixture(tiny.llama(), folder, verbose=False).train()
    model(**tiny.batch()).loss.backward()
    assert all(bool(gradient.any()) for gradient in tiny.gradients(model).values())


# Refusals


def refused(folder: Path, base: Any = None) -> str:
    model = tiny.llama() if base is None else base
    with pytest.raises(AdapterError) as caught:
        import_mixture(model, folder, verbose=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"routing_strategy": "mixlora-dynamic"}, "routing_strategy: found 'mixlora-dynamic', .* share of probability"),
        ({"routing_strategy": "mixlora-switch"}, "found 'mixlora-switch', expected 'mixlora', .* capacity"),
        ({"routing_strategy": "mixtral"}, "found 'mixtral', .*legacy_weights_convertor.py"),
        ({"routing_strategy": "mola"}, "found 'mola', expected 'mixlora', as peft_type says; the two settings do not"),
        ({"use_dora": True}, "use_dora: found True, .* does not save the magnitudes"),
        ({"expert_lora": {"use_dora": True}}, "expert_lora: use_dora: found True"),
        ({"expert_lora": {"rank": 3}}, "expert_lora: rank: found 3, .* does not know this setting"),
        ({"act_fn": "relu"}, r"act_fn: found 'relu', expected the base model's \(silu\)"),
        ({"bias": "all"}, "bias: found 'all', expected 'none'"),
        ({"top_k": 4}, "top_k: found 4, expected an integer from 1 to 3"),
        ({"num_experts": 4}, "expert 3 of 'model.layers.0.mlp.down_proj': found nothing"),
        (
            {"num_experts": 2},
            r"experts\.2\.lora_A\.weight: found such a name, expected mixlora\.layers.* and 2 experts",
        ),
        ({"r": 3}, r"lora_A\.weight: found shape \[2, 40\], expected rank 3 by adapter_config.json"),
        ({"lora_alpha": 0}, "lora_alpha: found 0, expected a number above 0"),
        ({"jitter_noise": -1}, "jitter_noise: found -1"),
        ({"target_modules": ["gate_proj"]}, "expert 0 of 'model.layers.0.mlp.down_proj': found tensors, expected none"),
        ({"target_modules": "mlp"}, "target_modules: found 'mlp', expected a list of names"),
        (
            {"target_modules": [*FFN, "q_proj"]},
            "LoRA of 'model.layers.0.self_attn.q_proj': found nothing, expected its",
        ),
        ({"noise_sigma": 0.5}, "noise_sigma: found 0.5, .* does not know this setting"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path / "x")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **values}))
    assert re.search(message, refused(folder))


GATE = "mixlora.layers.1.mlp.moe_gate.weight"
BESIDE = "mixlora.layers.0.self_attn.q_proj.lora_A.weight"
HALF = "mixlora.layers.1.mlp.up_proj.experts.2.lora_A.weight"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (GATE, None, "gate of 'model.layers.1.mlp': found nothing, expected its tensors"),
        (GATE, torch.zeros(3, 31), r"moe_gate\.weight: found shape \[3, 31\], expected \[3, 32\]"),
        (GATE, torch.full((3, 32), torch.inf), r"moe_gate\.weight: found NaN or infinite values"),
        (HALF, None, r"experts\.2\.lora_B\.weight: found no lora_A beside it, expected both halves"),
        (HALF, torch.full((2, 32), torch.nan), r"lora_A\.weight: found NaN or infinite values"),
        (HALF, torch.zeros(2, 31), "made for a 'model.layers.1.mlp.up_proj' of 31 -> 40 features"),
        (GATE.replace("1", "7"), torch.zeros(3, 32), r"layers\.7\.mlp\.moe_gate\.weight: found such a name"),
        ("mixlora.layers.0.mlp.up_proj.moe_gate.weight", torch.zeros(3, 32), "found such a name"),
        ("classifier", torch.zeros(2, 32), "classifier: found the head of a classifier"),
        (BESIDE, torch.zeros(2, 32), "LoRA of 'model.layers.0.self_attn.q_proj': found tensors, expected none"),
        ("mixlora.layers.0.mlp.up_proj.lora_A.weight", torch.zeros(2, 32), "found such a name"),
        ("moe_gate.weight", torch.zeros(3, 32), "moe_gate.weight: found such a name"),
        ("q_proj.lora_A.weight", torch.zeros(2, 32), "q_proj.lora_A.weight: found such a name"),
        ("up_proj.experts.0.lora_A.weight", torch.zeros(2, 32), "up_proj.experts.0.lora_A.weight: found such a name"),
    ],
)  # fmt: skip
def test_tensors_are_refused_by_name(tmp_path: Path, key: str, value: Tensor | None, message: str) -> None:
    folder = folder_of(tmp_path / "x")
    state = {name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if name != key}
    save_file({**state, **({} if value is None else {key: value})}, folder / "adapter_model.safetensors")
    assert re.search(message, refused(folder))


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("mixlora", BESIDE, None, "q_proj.lora_B.weight: found no lora_A beside it, expected both halves"),
        ("loramoe", BESIDE, torch.zeros(3, 32), r"found shape \[3, 32\], expected rank 2 by adapter_config.json"),
        ("mixlora", BESIDE, torch.zeros(2, 31), "made for a 'model.layers.0.self_attn.q_proj' of 31 -> 32 features"),
        ("mixlora", BESIDE, torch.full((2, 32), torch.nan), r"lora_A\.weight: found NaN or infinite values"),
        ("mola", BESIDE, torch.zeros(2, 32), r"q_proj\.lora_A\.weight: found such a name"),
    ],
)
def test_loras_of_attention_are_refused_by_name(
    kind: str, key: str, value: Tensor | None, message: str, tmp_path: Path
) -> None:
    folder, key = folder_of(tmp_path / "x", kind, targets=TEMPLATE), key.replace("mixlora", kind)
    state = {name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if name != key}
    save_file({**state, **({} if value is None else {key: value})}, folder / "adapter_model.safetensors")
    assert re.search(message, refused(folder))


def test_a_pickle_is_not_opened_and_the_snippet_converts_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x")
    weights, pickle = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    torch.save({key: nn.Parameter(value) for key, value in load_file(weights).items()}, pickle)
    expected = logits(import_mixture(tiny.llama(), folder, verbose=False))
    weights.unlink()
    found = refused(folder)
    assert "adapter_model.bin: format: found a pickle, which can run code and is never opened" in found
    state = torch.load(pickle, map_location="cpu", weights_only=True)  # what the message says
    save_file({k: v.detach().contiguous() for k, v in state.items()}, weights)
    assert torch.equal(logits(import_mixture(tiny.llama(), folder, verbose=False)), expected)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x")
    assert "gate of 'model.layers.2.mlp': found nothing" in refused(folder, tiny.llama(num_hidden_layers=3))
    assert "mixlora.layers.1.mlp.down_proj.experts.0.lora_A.weight: found such a name" in refused(
        folder, tiny.llama(num_hidden_layers=1)
    )
    assert "of 40 -> 32 features, here it has 48 -> 32" in refused(folder, tiny.llama(intermediate_size=48))


def test_a_fused_projection_is_refused(tmp_path: Path) -> None:
    shape = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "intermediate_size": 40, "num_hidden_layers": 2}
    config = Phi3Config(**shape, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2)
    base = tiny._seeded(Phi3ForCausalLM, config, 0, torch.float32)
    folder = folder_of(tmp_path / "x", targets=["gate_up_proj", "down_proj"], base=base)
    assert "found a block of gate_up_proj, down_proj" in refused(folder, base)


def test_experts_are_not_taken_beside_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it holds its own experts"):
        import_mixture(tiny.llama(), folder_of(tmp_path / "x"), [tmp_path])
