"""Checkpoints of MeteoRA, against its formulas.

Layout and formulas were read from NJUDeepEngine/meteora at 2d192ad: ``utils.py`` (load_meteora_model loads
model.safetensors into the whole PeftModel, strictly), ``MoELoRA/layer.py`` (moe_gate, lora_A and lora_B of a MoELinear,
scaling, forward), ``MoELoRA/peft_model.py`` (merge_lora_weights puts halves one after the other), ``constant.py``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moelora
from moelora.core.errors import AdapterError, ConfigError
from moelora.tools.mixtures import import_mixture
from tests import tiny
from tests.adapters import peft_folder

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."
E, R = 3, 2


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRAs of one rank and unlike scales."""
    folder, options = tmp_path_factory.mktemp("loras"), [{}, {"lora_alpha": 7}, {"use_rslora": True}]
    made = [{"r": R, "target_modules": TARGETS, "seed": i, **more} for i, more in enumerate(options)]
    return [peft_folder(folder / f"task_{i}", **how) for i, how in enumerate(made)]


@pytest.fixture
def checkpoint(tmp_path: Path, experts: list[Path]) -> Path:
    return write(tmp_path / "top_2", experts)


def write(folder: Path, experts: list[Path], trained_on: float = 0.1, base: Any = None) -> Path:
    """model.safetensors of a PeftModel around adapted layers. trained_on: how far the halves moved since."""
    folder.mkdir()
    loras, made = (
        [load_file(expert / "adapter_model.safetensors") for expert in experts],
        torch.Generator().manual_seed(5),
    )
    state = {}
    for name, value in (base or tiny.llama()).state_dict().items():
        path, _, kind = name.rpartition(".")
        adapted = path.rpartition(".")[2] in TARGETS
        state[f"{PREFIX}{path}{'.base_layer' if adapted else ''}.{kind}"] = value.clone()
        if adapted:
            for half, axis in (("lora_A", 0), ("lora_B", 1)):
                whole = torch.cat([lora[f"{PREFIX}{path}.{half}.weight"] for lora in loras], axis)
                state[f"{PREFIX}{path}.{half}.weight"] = whole + trained_on * torch.randn(whole.shape, generator=made)
            state[f"{PREFIX}{path}.moe_gate.weight"] = torch.randn(len(experts), value.shape[1], generator=made)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def oracle(folder: Path, experts: list[Path], k: int = 2, temperature: float = 1.0) -> Tensor:
    """Logits of the formulas, token by token."""
    state, base = load_file(folder / "model.safetensors"), tiny.llama().eval()
    scales = []
    for expert in experts:
        config = json.loads((expert / "adapter_config.json").read_text())
        scales.append(config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"]))

    def hook(path: str) -> Any:
        gate, A, B = (state[f"{PREFIX}{path}.{part}.weight"] for part in ("moe_gate", "lora_A", "lora_B"))

        def add(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            y = y.clone()
            for row in range(y.shape[0]):
                for t in range(y.shape[1]):
                    x = args[0][row, t]
                    chosen = (gate @ x).topk(k)
                    weights = (chosen.values / temperature).softmax(0)
                    for weight, e in zip(weights, chosen.indices.tolist(), strict=True):
                        own = slice(e * R, (e + 1) * R)
                        y[row, t] += B[:, own] @ (A[own] @ x) * scales[e] * weight
            return y

        return add

    for path, module in base.named_modules():
        if f"{PREFIX}{path}.moe_gate.weight" in state:
            module.register_forward_hook(hook(path))
    return logits(base)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**tiny.unlabelled(tiny.batch()), use_cache=False).logits


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 3, "temperature": 15.0}])
def test_equals_the_formulas(checkpoint: Path, experts: list[Path], options: dict[str, Any]) -> None:
    model = import_mixture(tiny.llama(), checkpoint, experts, router=options, verbose=False)
    expected = oracle(checkpoint, experts, options.get("top_k", 2), options.get("temperature", 1.0))
    torch.testing.assert_close(logits(model), expected, rtol=2e-5, atol=2e-5)
    assert (logits(tiny.llama()) - expected).abs().max() > 0.1
    moelora.save(model, checkpoint.parent / "ours")
    assert torch.equal(logits(moelora.load(tiny.llama(), checkpoint.parent / "ours")), logits(model))


def test_a_checkpoint_of_gates_alone_takes_the_experts_as_they_are(tmp_path: Path, experts: list[Path]) -> None:
    folder = write(tmp_path / "x", experts, trained_on=0)
    whole = import_mixture(tiny.llama(), folder, experts, verbose=False)
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "moe_gate" in k}, folder / "model.safetensors")
    assert torch.equal(logits(import_mixture(tiny.llama(), folder, experts, verbose=False)), logits(whole))


def test_a_base_model_in_another_dtype_is_the_same(checkpoint: Path, experts: list[Path]) -> None:
    state = load_file(checkpoint / "model.safetensors")
    save_file({key: value.bfloat16() for key, value in state.items()}, checkpoint / "model.safetensors")
    model = import_mixture(tiny.llama(), checkpoint, experts, verbose=False)
    key = "model.layers.0.self_attn.q_proj"
    assert torch.equal(
        model.get_submodule(key).router.weight, state[f"{PREFIX}{key}.moe_gate.weight"].bfloat16().float()
    )


def test_what_was_assumed_is_said(checkpoint: Path, experts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    import_mixture(tiny.llama(), checkpoint, experts)
    assert "note: top_k 2, temperature 1: the checkpoint does not record them" in capsys.readouterr().out


# Refusals


def refused(folder: Path, experts: list[Path], base: Any = None) -> str:
    model = tiny.llama() if base is None else base
    with pytest.raises(AdapterError) as caught:
        import_mixture(model, folder, experts, verbose=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(caught.value)


def test_the_experts_must_be_its_own(tmp_path: Path, checkpoint: Path, experts: list[Path]) -> None:
    assert "experts: found none, expected rank and lora_alpha of each" in refused(checkpoint, [])
    assert "experts: found 2 in what was given, expected 3, as its gates have rows" in refused(checkpoint, experts[:2])
    still = write(tmp_path / "still", experts, trained_on=0)
    assert "expert 0 of" in refused(still, experts[::-1]) and "order of training" in refused(still, experts[::-1])
    fewer = peft_folder(tmp_path / "fewer", r=R, target_modules=["q_proj", "up_proj"])
    assert "no LoRA, and a gate" in refused(checkpoint, [*experts[:2], fewer])
    wide = peft_folder(tmp_path / "wide", r=3, target_modules=TARGETS)
    assert "found experts of ranks [2, 3], expected one rank" in refused(checkpoint, [*experts[:2], wide])
    every = [peft_folder(tmp_path / f"every_{i}", r=3, target_modules=TARGETS) for i in range(3)]
    assert "lora_A.weight: found shape [6, 40], expected [9, 40]: 3 experts of rank 3" in refused(checkpoint, every)
    dora = peft_folder(tmp_path / "dora", r=R, target_modules=TARGETS, use_dora=True)
    assert "expert: found magnitude, expected LoRA alone" in refused(checkpoint, [*experts[:2], dora])


def test_the_base_model_must_be_its_own(checkpoint: Path, experts: list[Path]) -> None:
    found = refused(checkpoint, experts, tiny.llama(seed=1))
    assert "found other values than this LlamaForCausalLM has" in found and "base_layer.weight" in found
    assert "lm_head.weight: found shape [64, 32], expected [70, 32]" in refused(
        checkpoint, experts, tiny.llama(vocab_size=70)
    )
    assert "it adapts 'model.layers.1." in refused(checkpoint, experts, tiny.llama(num_hidden_layers=1))


KEY = f"{PREFIX}model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"{KEY}.moe_gate.weight", None, "'model.layers.1.mlp.up_proj': found no gate, expected both"),
        (f"{KEY}.moe_gate.weight", torch.zeros(3, 31), r"moe_gate\.weight: found shape \[3, 31\], expected \[3, 32\]"),
        (f"{KEY}.moe_gate.weight", torch.full((3, 32), torch.nan), "found NaN or infinite values"),
        (f"{KEY}.lora_A.weight", None, "found lora_B, expected lora_A and lora_B"),
        (f"{KEY}.lora_A.weight", torch.full((6, 32), torch.inf), "found NaN or infinite values"),
        (f"{KEY}.lora_B.weight", torch.zeros(40, 5), r"found shape \[40, 5\], expected \[40, 6\]"),
        (f"{PREFIX}model.layers.1.mlp.lora_embedding_A", torch.zeros(2), "expected a weight of LlamaForCausalLM"),
        ("model.norm.weight", torch.zeros(32), "model.norm.weight: found such a name, expected one that starts with"),
    ],
)
def test_tensors_are_refused_by_name(
    checkpoint: Path, experts: list[Path], key: str, value: Tensor | None, message: str
) -> None:
    state = {name: tensor for name, tensor in load_file(checkpoint / "model.safetensors").items() if name != key}
    save_file({**state, **({} if value is None else {key: value})}, checkpoint / "model.safetensors")
    assert re.search(message, refused(checkpoint, experts))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model_fsdp_0"])
def test_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    if name.endswith(".bin"):
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    else:
        (folder / name).mkdir()
    found = refused(folder, [])
    assert f"{name}: format: found pickles, which can run code and are never opened" in found


def test_options_that_a_folder_records_are_not_taken(checkpoint: Path, experts: list[Path]) -> None:
    with pytest.raises(AdapterError, match=r"routers\.meteora: unknown key 'top_p'"):
        import_mixture(tiny.llama(), checkpoint, experts, router={"top_p": 1}, verbose=False)
    with pytest.raises(ConfigError, match="it records all options of its router; leave top_k out"):
        import_mixture(tiny.llama(), experts[0], router={"top_k": 1})
