"""Folders of ``xlora``, the package of X-LoRA's authors (EricLBuehler/xlora).

    xlora_config.json               settings, and the names of the experts in ``adapters``, in order
    xlora_classifier.safetensors    inner.<i>.weight and .bias, last.weight and .bias; no bias with use_bias: false
    <name>/                         the experts, PEFT LoRAs, as its save_pretrained writes them

Inner layers stand at 0, 3, 6, ..., between them ReLU and dropout. A head without biases gets zeros, which is the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.io.files import fail
from moelora.io.tensors import TensorFile
from moelora.tools.mixtures.base import Mixture, Settings, read_floats
from moelora.tools.mixtures.peft_xlora import MAX_EXPERTS, read_head, xlora_mixture
from moelora.tools.mixtures.xlora_experts import open_experts

CONFIG, WEIGHTS, PICKLE = "xlora_config.json", "xlora_classifier.safetensors", "xlora_classifier.pt"
NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.-]{1,128}")
JOINT = (
    "xlora takes this softmax over all tokens of a batch together, so an answer depends on its neighbours, and moelora "
    "has no such router: train the router again without it"
)


def read(folder: Path, experts: Sequence[str | Path], model: nn.Module) -> Mixture:
    """What the folder holds. Raises AdapterError."""
    settings = Settings(folder, CONFIG)
    settings.ignore("base_model_id")
    names = _names(settings, experts)
    head, trainable = read_head(settings, len(names)), settings.flag("use_trainable_adapters", False)
    settings.off("enable_softmax_topk", JOINT)
    biased = settings.flag("use_bias", True)
    # before April 2024 false was the default, and the file always says which
    if not settings.flag("enable_relu_and_dropout", True) and head.depth > 1:
        what = "moelora's head has ReLU between its layers: train the router again with it, or with xlora_depth: 1"
        fail(settings.path, "enable_relu_and_dropout", "false", "true, or xlora_depth: 1", what)
    settings.close()
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        what = (
            "if you trust its origin: state = torch.load('xlora_classifier.pt', map_location='cpu', weights_only=True)"
            f"; safetensors.torch.save_file(state, '{WEIGHTS}')"
        )
        fail(folder / PICKLE, "format", "a pickle, which can run code and is never opened", WEIGHTS, what)
    layers = [*(f"inner.{3 * i}" for i in range(head.depth - 1)), "last"]
    sources = open_experts(folder, names, experts, model)
    sites = {path for source in sources for path in source.adapter.modules}
    tensors: list[Tensor] = []
    with closing(TensorFile(folder, WEIGHTS)) as file:
        wanted = {f"{layer}.{part}" for layer in layers for part in ("weight", *(["bias"] if biased else []))}
        for name in sorted(file.entries.keys() - wanted):
            expected = ", ".join(sorted(wanted))
            fail(file.path, name, "a tensor that this router has not", expected, "copy both files again")
        for layer, shape in zip(layers, head.shapes(len(names), len(sites)), strict=True):
            tensors.append(read_floats(file, f"{layer}.weight", shape, head.why))
            bias = read_floats(file, f"{layer}.bias", shape[:1], head.why) if biased else torch.zeros(shape[:1])
            tensors.append(bias)
    return xlora_mixture(folder, sources, head.options, tensors, trainable, model, [])


def _names(settings: Settings, experts: Sequence[str | Path]) -> list[str]:
    """The experts by name. Releases before March 2024 did not save names; the caller's folders count then."""

    def good(value: Any) -> bool:
        names = list(value) if isinstance(value, list | dict) else []
        fine = 1 <= len(names) <= MAX_EXPERTS and all(isinstance(n, str) and NAME.fullmatch(n) for n in names)
        return fine and len(set(names)) == len(names)

    settings.asked.add("adapters")
    if settings.values.get("adapters") is None and experts:
        return [f"given_{index}" for index in range(len(experts))]
    what = "give the folders of the experts, in the order of the router: experts=[...], or --expert"
    return list(settings.take("adapters", good, "the names of the experts, as folders are named", None, what))
