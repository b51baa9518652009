"""Base models whose weights bitsandbytes keeps in 4 or 8 bits."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from moelora.core.errors import ConfigError
from moelora.core.validate import Strict


class Quantization(Strict):
    """How bitsandbytes quantises the base model while it is loaded: transformers' BitsAndBytesConfig, by its names and
    with its defaults.

    One of load_in_4bit and load_in_8bit. Linear layers are quantised, but for the output head and
    llm_int8_skip_modules. What takes one value only stands for what is not supported: weights stored as other numbers
    than bytes (engines cast these), kept in 16 bits (the base is frozen), or in part in the host's memory.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bnb_4bit_quant_storage: Literal["uint8"] = "uint8"
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_has_fp16_weight: Literal[False] = False
    llm_int8_enable_fp32_cpu_offload: Literal[False] = False

    @model_validator(mode="after")
    def _one_way(self) -> Quantization:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("expected load_in_4bit: true or load_in_8bit: true, and not both")
        return self

    def for_transformers(self) -> BitsAndBytesConfig:
        """What ``from_pretrained`` takes. Raises ConfigError without bitsandbytes."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "quantization_config: bitsandbytes is not installed; pip install 'moelora[quant]', or leave it out"
            )
        return BitsAndBytesConfig(**self.model_dump())


def form(weight: Tensor) -> str | None:
    """How a quantised weight is kept (``nf4``, ``fp4``, ``int8``); None for one that is not quantised."""
    if getattr(weight, "quant_state", None) is not None:
        kind: str = weight.quant_state.quant_type  # type: ignore[attr-defined]
        return kind
    return None if weight.is_floating_point() else str(weight.dtype).removeprefix("torch.")


def form_of(fingerprint: str) -> str:
    """How the weights are kept that a fingerprint is of."""
    return fingerprint.rpartition(":")[0] or "unquantised"


def shape_of(weight: Any) -> tuple[int, ...]:
    """The shape of what is kept: a 4-bit weight's own is that of its bytes, one of ZeRO-3 has none."""
    state = getattr(weight, "quant_state", None)
    return tuple(getattr(weight, "ds_shape", weight.shape) if state is None else state.shape)


def size_of(weight: Tensor) -> int:
    """How many numbers a parameter keeps."""
    return math.prod(shape_of(weight))


def constants(layer: nn.Module) -> Iterator[Tensor]:
    """What a quantised layer keeps beside its weight, to read it."""
    weight: Any = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        found = (getattr(part, name, None) for name in ("absmax", "code", "offset"))
        yield from (value for value in found if isinstance(value, Tensor))
    rows = getattr(weight, "SCB", None)  # it moves with the first forward
    rows = getattr(getattr(layer, "state", None), "SCB", None) if rows is None else rows
    if isinstance(rows, Tensor):
        yield rows


def empty(model: Any, how: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Quantise a model on the meta device: the layers that transformers would, in the sizes they would have."""
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(how, pre_quantized=False).preprocess_model(model, device_map=None)
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if hasattr(weight, "bnb_quantized"):
            from bitsandbytes.functional import quantize_4bit

            twice, kind, storage = weight.compress_statistics, weight.quant_type, weight.quant_storage
            weight.data, weight.quant_state = quantize_4bit(
                weight.data.to(dtype), compress_statistics=twice, quant_type=kind, quant_storage=storage
            )
        elif hasattr(weight, "has_fp16_weights"):
            weight.data = weight.data.to(torch.int8)
            weight.SCB = torch.empty(len(weight), dtype=torch.float32, device="meta")


def steady(model: nn.Module) -> None:
    """Keep 4-bit layers as they were loaded.

    On CPUs with AVX512-BF16 bitsandbytes takes a layer's first evaluation for the end of its training: weights are put
    into another order, their scales rounded, and from then on no gradient passes (0.50).
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                layer.state_dict()  # puts them back
