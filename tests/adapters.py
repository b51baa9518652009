"""Adapters as PEFT writes them, PEFT's own logits, and mixtures of them: what the tests of imported experts share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora.io.peft import WEIGHTS
from moelora.model.record import routed_layers
from tests import tiny

BASES = {
    "llama": tiny.llama,
    "qwen": tiny.qwen,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "t5": tiny.t5,
    "mamba": tiny.mamba,
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen": ["q_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value", "intermediate.dense"],
    "t5": ["q", "wo"],
    "mamba": ["in_proj", "x_proj"],
}


@torch.no_grad()
def base(kind: str = "llama", **options: Any) -> Any:
    """A tiny model whose biases are not zero, so that it matters what becomes of them."""
    model = BASES[kind](**options)
    made = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=made))
    return model


def peft_folder(
    folder: Path, kind: str = "llama", r: int = 4, seed: int = 0, dtype: torch.dtype | None = None, **options: Any
) -> Path:
    """A LoRA as PEFT writes it, scale 2 unless told otherwise, all of it random as if trained; dtype: of the file."""
    config = {"r": r, "lora_alpha": 2 * r, "target_modules": TARGETS[kind], **options}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(kind), LoraConfig(**config))
    return shaken(model, folder, dtype)


@torch.no_grad()
def shaken(model: Any, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Save a PEFT model after what stands in for training: all that trains is moved, B far from zero."""
    moved = model.peft_config["default"].init_lora_weights in ("pissa", "olora")
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) if parameter.requires_grad else parameter
        if "lora_B" in name and name.endswith("weight") and parameter.requires_grad and not moved:
            parameter.copy_(0.3 * noise)
        elif "lora_magnitude_vector" in name:
            parameter.mul_(0.7 + torch.rand_like(parameter))
        elif parameter.requires_grad:
            parameter.add_(0.1 * noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT, on the shape of its own biases
        model.save_pretrained(folder)
    if dtype is not None:
        cast(folder, dtype)
    return folder


def cast(folder: Path, dtype: torch.dtype, part: str = "") -> Path:
    """Give the tensors of a file another dtype, or those with ``part`` in their names."""
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: value.to(dtype) if part in name else value for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def mixture_config(folders: Sequence[Path], kind: str = "llama", r: int = 4, **more: Any) -> dict[str, Any]:
    """These folders as frozen experts, mixed by a gate that a test can set."""
    return {
        "router": {"name": "static", "weights_fn": "free"},
        "target_modules": TARGETS[kind],
        **more,
        "experts": {
            "num_experts": len(folders), "r": r, "lora_alpha": 2 * r, "train": "none",
            "adapters": [str(folder) for folder in folders],
            **more.get("experts", {}),
        },
    }  # fmt: skip


def mixture(folders: Sequence[Path], kind: str = "llama", r: int = 4, model: Any = None, **more: Any) -> Any:
    """A base model, the tiny one unless given, with the experts of ``mixture_config``."""
    model = base(kind) if model is None else model
    return tiny.adapt(model, mixture_config(folders, kind, r, **more)).eval()


@torch.no_grad()
def logits(model: Any, kind: str) -> Tensor:
    """Those of one batch, without gradients."""
    decoder = {"decoder_input_ids": tiny.batch("llama")["input_ids"]} if kind == "t5" else {}
    found: Tensor = model(**tiny.unlabelled(tiny.batch(kind)), **decoder).logits
    return found


def peft_logits(folder: Path, kind: str = "llama", model: Any = None) -> Tensor:
    """The oracle: PEFT's, of a base model with one adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(base(kind) if model is None else model, folder).eval(), kind)


@torch.no_grad()
def choose(model: Any, *gates: float) -> Any:
    """The model with these static gates in every layer, all others zero."""
    for layer in routed_layers(model):
        layer.router.theta.zero_()[: len(gates)] = torch.tensor(gates)
    return model


def only(model: Any, expert: int) -> Any:
    """The model with one expert alone."""
    return choose(model, *[0.0] * expert, 1.0)
