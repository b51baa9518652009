"""X-LoRA folders as PEFT writes them.

    adapter_config.json          peft_type XLORA
    adapter_model.safetensors    base_model.internal_xlora_classifier.layers.<i>.weight and .bias
    0/, 1/, ...                  the experts (``xlora_experts``)

Layers of the head stand at 0, 3, 6, ..., between them ReLU and dropout; at 0, 2, 4, ... with xlora_dropout_p: 0. With
layerwise_scalings the last has E values for each adapted module, in the order of the base model's modules.

PEFT 0.20 to 0.21.2 leave out the layers whose number is the name of an expert. The file of that expert holds them,
without the number, and there they are found; where there is no such file the router is lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from moelora.core.errors import AdapterError
from moelora.io.files import AGAIN, fail, short
from moelora.io.peft import CONFIG, WEIGHTS
from moelora.io.tensors import MAX_WIDTH, TensorFile
from moelora.model.sources import Source, open_sources
from moelora.tools.mixtures.base import Mixture, Settings, read_floats, target_rule
from moelora.tools.mixtures.xlora_experts import ROUTER, open_experts

RECORDED = ("peft_type", "task_type", "auto_mapping", "inference_mode", "base_model_name_or_path", "revision")
MAX_EXPERTS, MAX_DEPTH = 4096, 256


def read(folder: Path, experts: Sequence[str | Path], model: nn.Module) -> Mixture:
    """What the folder holds. Raises AdapterError."""
    settings = Settings(folder, CONFIG)
    settings.ignore(*RECORDED, "peft_version")
    names = _names(settings)
    head, trainable = read_head(settings, len(names)), settings.flag("use_trainable_adapters", False)
    softmax_topk = settings.flag("enable_softmax_topk", False)
    if softmax_topk:
        head.options.update(enable_softmax_topk=True, top_k=head.options["top_k"] or len(names))
    settings.close()
    step = 3 if head.options["xlora_dropout_p"] else 2
    keys = [f"layers.{step * i}.{part}" for i in range(head.depth) for part in ("weight", "bias")]
    with ExitStack() as stack:
        file = stack.enter_context(closing(TensorFile(folder, WEIGHTS)))
        found = _find(file, keys, names, folder, stack)
        lost = [key for key in keys if key not in found]
        if lost:
            _diagnose(file, lost, len(keys), names, experts, settings)
        try:
            sources = open_experts(folder, names, experts, model)
        except AdapterError as error:
            raise error if experts else AdapterError(f"{error}. {_made_from(settings)}") from None
        sites = {path for source in sources for path in source.adapter.modules}
        shapes = [shape for pair in head.shapes(len(names), len(sites)) for shape in (pair, pair[:1])]
        tensors = [read_floats(*found[key], shape, head.why) for key, shape in zip(keys, shapes, strict=True)]
    notes = []
    if softmax_topk and settings.values.get("peft_version") is None:
        notes.append("enable_softmax_topk: per token, as from PEFT 0.18; those before took it over all tokens together")
    return xlora_mixture(folder, sources, head.options, tensors, trainable, model, notes)


@dataclass(frozen=True)
class Head:
    """The head: options of ``routers.xlora``, and how wide its layers are."""

    options: dict[str, Any]
    hidden: int

    @property
    def depth(self) -> int:
        depth: int = self.options["xlora_depth"]
        return depth

    @property
    def why(self) -> str:
        return "by hidden_size, xlora_size, layerwise_scalings, the number of experts and of their modules"

    def shapes(self, experts: int, sites: int) -> list[tuple[int, int]]:
        """(out, in) of its layers."""
        last = experts * (sites if self.options["layerwise_scalings"] else 1)
        widths = [self.hidden, *[self.options["xlora_size"]] * (self.depth - 1), last]
        return [(out, wide) for wide, out in pairwise(widths)]


def read_head(settings: Settings, experts: int) -> Head:
    """The settings that PEFT and the package xlora share."""
    ours = (
        "moelora's first pass is without experts, as the paper's is: train the router again with scaling_pass_value: 0"
    )
    settings.number("scaling_pass_value", lambda v: v == 0, "0", 0.0, ours)
    options = {
        "name": "xlora",
        "xlora_depth": settings.whole("xlora_depth", 1, MAX_DEPTH, 1),
        "xlora_size": settings.whole("xlora_size", 1, MAX_WIDTH, 2048),
        "xlora_dropout_p": settings.number("xlora_dropout_p", lambda v: 0 <= v < 1, "a number from 0, below 1", 0.2),
        "layerwise_scalings": settings.flag("layerwise_scalings", False),
        "enable_softmax": settings.flag("enable_softmax", True),
        "softmax_temperature": settings.number("softmax_temperature", lambda v: v > 0, "a number above 0", 1.0),
        "top_k": settings.take(
            "top_k_lora",
            lambda v: v is None or (type(v) is int and 1 <= v <= experts),
            f"null, or an integer from 1 to the {experts} experts",
        ),
        "global_scaling_weight": settings.number("global_scaling_weight", lambda v: True, "a number", 1.0),
    }
    return Head(options, settings.whole("hidden_size", 1, MAX_WIDTH))


def xlora_mixture(
    folder: Path,
    sources: list[Source],
    router: dict[str, Any],
    tensors: Sequence[Tensor],
    trainable: bool,
    model: nn.Module,
    notes: list[str],
) -> Mixture:
    """The mixture with one head for all layers; tensors: weight and bias of its layers, from the first to the last."""
    paths = {path for source in sources for path in source.adapter.modules}
    dropouts = {float(source.adapter.config.get("lora_dropout") or 0) for source in sources}
    if len(dropouts) > 1:
        notes = [*notes, f"lora_dropout: 0, since the experts have several ({', '.join(map(str, sorted(dropouts)))})"]
    adapter = {
        "router": router,
        "target_modules": target_rule(model, paths, folder),
        "experts": {
            "num_experts": len(sources),
            "r": max(source.rank(path) for source in sources for path in paths),
            "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
            "train": "all" if trainable else "none",
            "adapters": [source.entry for source in sources],
        },
    }
    parts = [f"head.{3 * i}.{part}" for i in range(router["xlora_depth"]) for part in ("weight", "bias")]
    state = dict(zip(parts, tensors, strict=True))
    return Mixture(folder, adapter, sources, lambda site: state, notes)


def _names(settings: Settings) -> list[str]:
    """Experts by name. PEFT sorts these in the file, and runs no X-LoRA whose experts have other names."""
    found = settings.take(
        "adapters",
        lambda v: isinstance(v, dict) and 1 <= len(v) <= MAX_EXPERTS and v.keys() == set(map(str, range(len(v)))),
        "paths by the names 0, 1, ...: PEFT runs X-LoRA with no other names",
    )
    return [str(index) for index in range(len(found))]


def _find(
    file: TensorFile, keys: Sequence[str], names: Sequence[str], folder: Path, stack: ExitStack
) -> dict[str, tuple[TensorFile, str]]:
    """Where each tensor of the head is; those that are lost are left out."""
    wanted = {f"{ROUTER}{key}": key for key in keys}
    for name in file.entries:
        if name not in wanted:
            what = "the two files do not match: copy both again"
            fail(file.path, name, "a tensor that this router has not", f"{ROUTER}{keys[0]} to {keys[-1]}", what)
    found = {wanted[name]: (file, name) for name in file.entries}
    others: dict[str, TensorFile] = {}
    for key in keys:
        _, number, part = key.split(".")
        if key in found or number not in names or not (folder / number / WEIGHTS).is_file():
            continue
        if number not in others:
            others[number] = stack.enter_context(closing(TensorFile(folder / number, WEIGHTS, folder)))
        if f"{ROUTER}layers.{part}" in others[number].entries:
            found[key] = (others[number], f"{ROUTER}layers.{part}")
    elsewhere = [key for key, (other, _) in found.items() if other is not file]
    if elsewhere:
        warnings.warn(
            f"{file.path}: PEFT lost {', '.join(elsewhere)} of the router here when it saved; they are read from the "
            "files of the experts of these numbers, where it left them",
            stacklevel=5,
        )
    return found


def _diagnose(
    file: TensorFile,
    lost: Sequence[str],
    count: int,
    names: Sequence[str],
    given: Sequence[str | Path],
    settings: Settings,
) -> NoReturn:
    """Say what is missing and what can still be used."""
    for key in lost:
        if key.split(".")[1] not in names:
            what = f"xlora_depth is {settings.values.get('xlora_depth')}; {AGAIN}"
            fail(file.path, f"{ROUTER}{key}", "nothing", "a layer of the router", what)
    whole = []
    for entry in given or [file.path.parent / name for name in names]:
        with suppress(AdapterError):
            for source in open_sources([entry]):
                source.adapter.file.close()
            whole.append(str(entry))
    use = f"These experts are whole, for a newly trained router: experts: {{adapters: [{', '.join(whole)}]}}"
    raise AdapterError(
        f"{file.path}: router: found {count - len(lost)} of {count} tensors, missing "
        f"{', '.join(f'{ROUTER}{key}' for key in lost)}; PEFT 0.20 to 0.21.2 lose every layer of the router whose "
        "number is the name of an expert when they save; it is in no file of this folder, which cannot be repaired: "
        "save the model again with PEFT 0.19, if you still have it. "
        + (use if whole else f"No expert in this folder can be used alone. {_made_from(settings)}")
    )


def _made_from(settings: Settings) -> str:
    paths = ", ".join(short(path) for path in list(settings.values["adapters"].values())[:8])
    return f"The configuration says that the experts were made from {paths}"
