"""Adapter folders to read and to spoil: by the installed PEFT, and byte by byte."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moelora.core.errors import AdapterError
from moelora.io.peft import CONFIG, PREFIX, WEIGHTS, PeftAdapter, read_peft
from tests import tiny

Q0 = "model.layers.0.self_attn.q_proj"
NAME = f"{PREFIX}{Q0}.lora_%s.weight"
CONFIGURED = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def written(folder: Path, base: Any = None, half: bool = False, fill: bool = True, **options: Any) -> Path:
    """A folder that PEFT writes for the tiny llama, every trained tensor random."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "gate_proj", "down_proj"], **options}
    if base is None:
        base = tiny.llama(dtype=torch.float16 if half else torch.float32, attention_bias="bias" in options)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=not half)
        for weight in model.parameters():
            if fill and weight.requires_grad:
                weight.data.normal_()
        model.save_pretrained(folder)
    return folder


def loaded(folder: Path, base: Any, half: bool = False) -> PeftModel:
    """The same folder as PEFT reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=not half)


def edit(folder: Path, **changes: Any) -> Path:
    """Replace settings; ``...`` takes one out."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def held(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the file, as safetensors itself reads them."""
    return {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}


def resave(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace tensors by name; None takes one out."""
    tensors = {**held(folder), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    tensors = held(folder)
    save_file({change(name): value for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


def by_hand(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder of these tensors (names without PEFT's prefix) and settings."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**CONFIGURED, **config}))
    save_file({f"{PREFIX}{name}": value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


def raw(folder: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """Put a safetensors file of this header there."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return folder


def refused(folder: Path, *parts: str, read: Callable[[Path], PeftAdapter] = read_peft) -> None:
    """Reading raises AdapterError with all that such errors say, and these parts."""
    with pytest.raises(AdapterError) as caught:
        read(folder)
    text = str(caught.value)
    assert str(folder) in text and "found" in text and "expected" in text and ";" in text, text
    assert [part for part in parts if part not in text] == [], text
    assert len(text) < 1500
    assert text.isprintable()


def reset_peak() -> int:
    """Forget the peak of this process; the bytes that it holds now, those of tensors included."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that the process has held since then."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
