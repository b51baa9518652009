"""Trainable parameters of published models, as their papers and released code count them.

Models are built from their dimensions on the meta device, where nothing is allocated. Where a paper prints millions,
its digits stand in the last column, rounded or cut off as there.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

import moelora
from moelora.model.record import routed_layers
from tests import tiny

# hidden, layers, heads, key-value heads, intermediate, vocabulary
SHAPES: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "Llama-2-7B": (LlamaForCausalLM, LlamaConfig, (4096, 32, 32, 32, 11008, 32000)),
    "Llama-3-8B": (LlamaForCausalLM, LlamaConfig, (4096, 32, 32, 8, 14336, 128256)),
    "Llama-3.1-8B": (LlamaForCausalLM, LlamaConfig, (4096, 32, 32, 8, 14336, 128256)),
    "Zephyr-7B": (MistralForCausalLM, MistralConfig, (4096, 32, 32, 8, 14336, 32000)),
    "Qwen3-8B": (Qwen3ForCausalLM, Qwen3Config, (4096, 36, 32, 8, 12288, 151936)),
    "Qwen3-14B": (Qwen3ForCausalLM, Qwen3Config, (5120, 40, 40, 8, 17408, 151936)),
}

COMOL = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
XLORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
ALL = "all-linear"


def lora(num_experts: int, r: int) -> dict[str, Any]:
    return {"num_experts": num_experts, "r": r}


def core(num_experts: int) -> dict[str, Any]:
    return {"name": "core", "num_experts": num_experts, "r": 16}


NO_CORE_ROUTING = {"name": "comol", "route_on": "x"}
LAYERWISE = {"name": "xlora", "layerwise_scalings": True}
SMORA = {"name": "smora", "top_k": 8}

# method, model, target layers, experts, router, what is counted, parameters, as printed (in millions)
TABLE: list[tuple[str, str, Any, dict[str, Any], Any, str, int, str]] = [
    ("LoRA", "Qwen3-8B", COMOL, lora(1, 16), "single", "all", 24_772_608, "24.77"),
    ("MoLoRA, 8 experts", "Qwen3-8B", COMOL, lora(8, 8), "softmax", "all", 107_347_968, "107.35"),
    ("CoMoL, math, 8 experts", "Qwen3-8B", COMOL, core(8), "comol", "all", 25_164_288, "25.16"),
    ("CoMoL, math, 64 experts", "Qwen3-8B", COMOL, core(64), "comol", "all", 27_906_048, "27.91"),
    ("CoMoL w/o CR, 8 experts", "Qwen3-8B", COMOL, core(8), NO_CORE_ROUTING, "all", 33_398_784, "33.39"),
    ("CoMoL w/o CR, 64 experts", "Qwen3-8B", COMOL, core(64), NO_CORE_ROUTING, "all", 93_782_016, "93.78"),
    ("CoMoL, math, 8 experts", "Qwen3-14B", COMOL, core(8), "comol", "all", 35_824_640, "35.82"),
    ("CoMoL, code, 4 experts", "Llama-3.1-8B", COMOL, core(4), "comol", "all", 23_242_752, "23.24"),
    ("CoMoL, code, 4 experts", "Qwen3-8B", COMOL, core(4), "comol", "all", 24_968_448, "24.97"),
    ("MeteoRA, 28 gates", "Llama-3-8B", ALL, lora(28, 8), "meteora", "router", 34_865_152, "34.9"),
    ("MeteoRA, 28 LoRAs", "Llama-3-8B", ALL, lora(28, 8), "meteora", "experts", 587_202_560, "587"),
    ("X-LoRA, one head", "Zephyr-7B", XLORA, lora(9, 8), "xlora", "router", 36_873, ""),
    ("X-LoRA, layerwise head", "Zephyr-7B", XLORA, lora(9, 8), LAYERWISE, "router", 5_899_680, ""),
    ("SMoRA, released code", "Llama-2-7B", ALL, lora(1, 64), SMORA, "all", 232_783_872, ""),
    ("SMoRA, with its biases", "Llama-2-7B", ALL, lora(1, 64), SMORA, "with biases", 232_798_208, ""),
]
IDS = [f"{row[0]} on {row[1]}" for row in TABLE]


def built(name: str) -> nn.Module:
    model, config, (hidden, layers, heads, groups, intermediate, vocabulary) = SHAPES[name]
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 128}
    more = {"num_key_value_heads": groups, "intermediate_size": intermediate, "vocab_size": vocabulary}
    with torch.device("meta"):
        return model(config(**shape, **more))


@functools.lru_cache(maxsize=1)
def adapted(name: str, config: str) -> nn.Module:
    """The model with experts; kept for the next row, which may count something else of it."""
    return moelora.adapt(built(name), json.loads(config), verbose=False)


def counted(model: nn.Module, what: str) -> int:
    sizes = {name: p.numel() for name, p in tiny.trainable(model).items()}
    if what in ("router", "experts"):
        return sum(size for name, size in sizes.items() if f".{what}." in name)
    biases = sum(bias.numel() for bias in tiny.biases(model).values())
    return sum(sizes.values()) + (biases if what == "with biases" else 0)


@pytest.mark.parametrize(("method", "name", "targets", "experts", "router", "what", "count", "printed"), TABLE, ids=IDS)
def test_size(
    method: str, name: str, targets: Any, experts: dict[str, Any], router: Any, what: str, count: int, printed: str
) -> None:
    model = adapted(name, json.dumps({"experts": experts, "router": router, "target_modules": targets}))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert counted(model, what) == count
    if printed:
        assert abs(count / 1e6 - float(printed)) < 10 ** -len(printed.partition(".")[2])
    if method.startswith("X-LoRA"):
        assert len(routed_layers(model)) == 160
