"""A strict reader of PEFT LoRA adapter folders. What cannot become an expert is refused by name.

    adapter_config.json          configuration, at most 1 MB
    adapter_model.safetensors    base_model.model.<module>, and then for a LoRA of rank r on a layer of D -> O features
        .lora_A.weight           [r, D]
        .lora_B.weight           [O, r]
        .lora_B.bias             [O]     with lora_bias
        .lora_magnitude_vector   [O]     with use_dora
        .base_layer.bias         [O]     with bias: lora_only or all, the bias in place of the base's
        .bias                    [O]     the same before PEFT 0.7; with bias: all, that of a module without LoRA too
    base_model.model.<module>.<name>     a module trained in full, with modules_to_save, or resized embeddings
        .original_module.<name>          the same before it was trained: not read
        .modules_to_save.<name>          the same once more: not read

No other file is opened, nothing is unpickled and no model is built. The header of the tensor file is checked against
the configuration before a tensor is read. The time and the memory that a file can cost are bounded.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from moelora.io.files import AGAIN, fail, read_object
from moelora.io.patterns import Budget
from moelora.io.peft_config import CONFIG, MOVED, PLAIN, check_config
from moelora.io.tensors import Entry, TensorFile

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")
CONVERT = "if you trust its origin: load it with PEFT and call save_pretrained(folder, safe_serialization=True)"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PARTS = {
    "A": re.compile(r"(.+)\.lora_A(?:\.default)?\.weight"),
    "B": re.compile(r"(.+)\.lora_B(?:\.default)?\.weight"),
    "bias": re.compile(r"(.+)\.lora_B(?:\.default)?\.bias"),
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
    "base_bias": re.compile(r"(.+)\.base_layer\.bias"),
}
COPIES = re.compile(r"(.+)\.(?:original_module|modules_to_save(?:\.default)?)(\..+)")
WRAPPED = re.compile(
    r"(?:^|\.)(?:|lora_[^.]*|base_layer|original_module|modules_to_save|token_adapter|_\w+_wrapped_module)(?:\.|$)"
)
"""Parts of a path that are no module of a base model."""
EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "shared", "embeddings", "embed_in", "tok_embeddings", "tokens_embed"),
    *("word_embedding", "token_embedding", "lm_head", "embed_out", "decoder", "proj_out", "output_projection"),
    *("output_layer", "vocab_projector", "lm_loss"),
)
"""What transformers calls the two modules that are saved where a vocabulary was resized."""
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""What was saved in full without being named in the configuration, before PEFT 0.12."""
MAX_SAVED = 1_000_000  # names of modules_to_save times tensors


@dataclass(frozen=True, eq=False)
class LoRATensors:
    """What an adapter adds to one module, in the dtypes of the file: A [r, D], B [O, r], and perhaps vectors [O].

    Its delta weight is ``scale * B @ A``. bias: of lora_B, scaled alike. magnitude: DoRA's, so the whole weight is
    ``magnitude * (W + delta)``, each row divided by its norm. base_bias: in place of the base layer's.
    """

    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    base_bias: Tensor | None = None


@dataclass
class Module:
    """What the header says of one module. features: (D, O) of the layer, None for what only a bias tells."""

    entries: dict[str, Entry] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.entries["A"].shape[0] if "A" in self.entries else 0

    @property
    def features(self) -> tuple[int | None, int]:
        if "A" in self.entries:
            return self.entries["A"].shape[1], self.entries["B"].shape[0]
        return None, self.entries["base_bias"].shape[0]


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A PEFT LoRA folder whose configuration and header are found good; tensors are read when they are asked for.

    modules: by path in the base model. full: tensors of modules trained in full, by name in the base model. moved:
    ``pissa`` or ``olora`` where that start was taken out of the base weights. Two adapters are never the same.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[str, Module]
    full: dict[str, Entry]
    file: TensorFile
    moved: str | None = None

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path")

    def read(self, module: str) -> LoRATensors:
        """The tensors of a module; empty ones of rank 0 where it has no LoRA. Raises AdapterError for NaN."""
        found = self.modules[module]
        given: dict[str, Any] = {part: self.file.read(entry.name) for part, entry in found.entries.items()}
        if "A" not in given:
            given.update(A=torch.zeros(0, 0), B=torch.zeros(found.features[1], 0))
        return LoRATensors(scale=found.scale, **given)

    def read_full(self, name: str) -> Tensor:
        """A tensor of ``full``."""
        return self.file.read(self.full[name].name)


def read_peft(folder: Path, root: Path | None = None) -> PeftAdapter:
    """The adapter that PEFT saved in a folder. root: where links may lead, if not only into the folder.

    Reads the configuration and the header of the tensors, no more. Warns of unknown settings that are off. Raises
    AdapterError.
    """
    folder = Path(folder)
    _refuse_absent(folder)
    config = read_object(folder, CONFIG, root=root)
    check_config(config, folder / CONFIG)
    file = TensorFile(folder, WEIGHTS, root)
    with ExitStack() as stack:
        stack.callback(file.close)
        modules, full = _sort(file, config)
        check_parts(modules, config, folder)
        check_ranks(modules, config, folder)
        stack.pop_all()
    start = config.get("init_lora_weights", True)
    return PeftAdapter(folder, config, modules, full, file, start if start in MOVED else None)


def warn_if_untrained(adapter: PeftAdapter) -> None:
    """Warn where the halves that start at zero are all still so; reads them, in pieces, until one is not."""
    half = "A" if adapter.config.get("init_lora_weights") == "mica" else "B"
    halves = [module.entries[half].name for module in adapter.modules.values() if half in module.entries]
    if halves and all(adapter.file.is_zero(name) for name in halves):
        message = f"{adapter.file.path}: every lora_{half} is zero, so the adapter changes nothing: was it trained?"
        warnings.warn(message, stacklevel=3)


def _refuse_absent(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        path = folder / name
        if os.path.lexists(path):
            continue
        pickled = next((other for other in PICKLES if os.path.lexists(folder / other)), None)
        if name == WEIGHTS and pickled is not None:
            fail(folder / pickled, "format", "a pickle, which can run code and is never opened", WEIGHTS, CONVERT)
        fail(path, "file", "nothing", f"{CONFIG} and {WEIGHTS} as PEFT's save_pretrained writes them", "check the path")


def _sort(file: TensorFile, config: dict[str, Any]) -> tuple[dict[str, Module], dict[str, Entry]]:
    """(parts of LoRAs by module, tensors of whole modules by name)."""
    modules: dict[str, Module] = {}
    full: dict[str, Entry] = {}
    bias = config.get("bias", "none")
    saved = (*(config.get("modules_to_save") or ()), *HEADS.get(config.get("task_type") or "", ()))
    if not file.entries:
        fail(file.path, "tensors", "none", "two for each module", "under ZeRO-3, gather the weights before saving")
    if len(saved) * len(file.entries) > MAX_SAVED:
        fail(file.path, "modules_to_save", f"{len(saved)} names for {len(file.entries)} tensors", "fewer", PLAIN)
    for name, entry in file.entries.items():
        if entry.dtype not in FLOATS:
            fail(file.path, name, f"dtype {str(entry.dtype).removeprefix('torch.')}", "a floating-point dtype", PLAIN)
        if 0 in entry.shape:
            what = "under ZeRO-3, gather the weights before saving"
            fail(file.path, name, f"shape {list(entry.shape)}", "no size of 0", what)
        if not name.startswith(PREFIX):
            fail(file.path, name, "such a name", f"one that starts with {PREFIX}", "save it from PEFT's PeftModel")
        path = name.removeprefix(PREFIX)
        part, match = "", None
        if "lora_" in path or path.endswith(".base_layer.bias"):
            part, match = next(((p, m) for p, rule in PARTS.items() if (m := rule.fullmatch(path))), (part, match))
        if match is None and (copy := COPIES.fullmatch(path)) and f"{PREFIX}{copy[1]}{copy[2]}" in file.entries:
            continue
        parent, _, leaf = path.rpartition(".")
        if match is None and not WRAPPED.search(path):
            if not _within(path, saved) and leaf == "bias" and bias in ("all", "lora_only"):
                part, match = "base_bias", re.fullmatch(r"(.+)\.bias", path)
            elif (
                _within(path, saved)
                or (bias == "all" and "bias" in path)  # such as T5's relative_attention_bias.weight
                or (leaf in ("weight", "bias") and parent.rpartition(".")[2] in EMBEDDINGS)
            ):
                full[path] = entry
                continue
        if match is None or WRAPPED.search(match[1]):
            _refuse_kind(file.path, name)
        entries = modules.setdefault(match[1], Module()).entries
        if part in entries:
            fail(file.path, name, f"{entries[part].name} too, which means the same", "it once", AGAIN)
        entries[part] = entry
    for path, entry in full.items():
        if (module := modules.get(path.rpartition(".")[0])) is not None and module.rank:
            fail(file.path, entry.name, "a weight of a module that has a LoRA too", "one of the two", AGAIN)
    return modules, full


def _within(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a tensor is of a module whose path ends like one of these, or of a module in it: PEFT's rule."""
    return any(f"{module}." in path for module in modules)


def _refuse_kind(path: Path, name: str) -> NoReturn:
    kinds = {
        "lora_embedding_": "LoRA of an embedding",
        "trainable_tokens": "trained tokens (trainable_token_indices)",
        "base_layer.lora_": "LoRA of a parameter (target_parameters)",
        "base_layer": "a weight of the base layer, as of an embedding or output layer with a LoRA",
        "_wrapped_module": "a name of FSDP or checkpointing wrappers",
    }
    kind = next((kind for part, kind in kinds.items() if part in name), "no part of LoRA, and not in modules_to_save")
    names = f"{PREFIX}<module>.lora_A.weight, .lora_B.weight, .lora_B.bias, .lora_magnitude_vector or .base_layer.bias"
    fail(path, name, kind, names, PLAIN)


def check_parts(modules: dict[str, Module], config: dict[str, Any], folder: Path) -> None:
    """Every module has the parts that the configuration says, of shapes that agree."""
    path = folder / WEIGHTS
    switches = {"bias": "lora_bias", "magnitude": "use_dora"}
    for module in modules.values():
        entries = module.entries
        some = next(iter(entries.values()))
        if entries.keys() == {"base_bias"} and config.get("bias") == "lora_only":
            fail(path, some.name, "a bias without a LoRA", "both, by bias: lora_only", AGAIN)
        for half, other in ("AB", "BA"):
            if half not in entries and (other in entries or entries.keys() != {"base_bias"}):
                fail(path, some.name, f"no lora_{half} beside it", "both halves", AGAIN)
        for part, key in switches.items():
            if (part in entries) != (config.get(key, False) and "A" in entries):
                found = "such a tensor" if part in entries else f"no tensor of {key}"
                what = "the two files do not match: copy both again"
                fail(path, entries.get(part, some).name, found, f"{key}: {config.get(key, False)} of {CONFIG}", what)
        if "base_bias" in entries and config.get("bias", "none") == "none":
            fail(path, entries["base_bias"].name, "a bias", f"none, by bias: none of {CONFIG}", AGAIN)
        for part, entry in entries.items():
            if len(entry.shape) != (2 if part in "AB" else 1) or 0 in entry.shape:
                what = "convolutions are not read; under ZeRO-3, gather the weights before saving"
                fail(path, entry.name, f"shape {list(entry.shape)}", "2 sizes" if part in "AB" else "1 size", what)
        for part, entry in entries.items():
            if part not in "AB" and entry.shape[0] != module.features[1]:
                fail(path, entry.name, f"shape {list(entry.shape)}", f"{module.features[1]} features", AGAIN)


def check_ranks(modules: dict[str, Module], config: dict[str, Any], folder: Path) -> None:
    """Give every module its scale, once its halves have the rank of the configuration."""
    budget = Budget(folder / CONFIG)
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    ranks = budget.lookup("rank_pattern", patterns["rank_pattern"], config["r"], len(modules))
    alphas = budget.lookup("alpha_pattern", patterns["alpha_pattern"], config["lora_alpha"], len(modules))
    for name, module in modules.items():
        if "A" not in module.entries:
            continue
        rank = ranks(name)
        for part, axis in (("A", 0), ("B", 1)):
            entry = module.entries[part]
            if entry.shape[axis] != rank:
                found, what = f"shape {list(entry.shape)}", "the two files do not match: copy both again"
                fail(folder / WEIGHTS, entry.name, found, f"rank {rank} by {CONFIG}", what)
        module.scale = alphas(name) / (math.sqrt(rank) if config.get("use_rslora", False) else rank)
