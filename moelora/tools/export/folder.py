"""Writing exports: a new folder that appears whole or not at all, and PEFT LoRA folders in it."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora import __version__
from moelora.core.errors import AdapterError, OutputError
from moelora.model.record import adaptation, routed_layers
from moelora.model.saved import saved_modules
from moelora.model.write import SUFFIXES
from moelora.tools.export.plain import PlainLoRA

CONFIG, WEIGHTS, REPORT = "adapter_config.json", "adapter_model.safetensors", "export.json"
PREFIX = "base_model.model."


@dataclass
class Export:
    """What an export did. errors: relative error of every module against the model, by folder and module path.

    notes: what the user must know. figures: numbers that were measured, JSON-ready. source: what it was made from.
    """

    kind: str
    folder: Path
    source: dict[str, Any]
    task: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the largest error, and that error."""
        name = max(self.errors, key=self.errors.__getitem__, default="")
        return name, self.errors.get(name, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Everything but the errors of single modules, of which the worst is given."""
        name, error = self.worst
        check = {"modules": len(self.errors), "worst_module": name, "worst_relative_error": error}
        start = {"to": self.kind, "task": self.task, "source": self.source, "check": check, "notes": self.notes}
        return {**start, **self.figures}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that takes its name when all has been written, and goes when anything fails.

    Raises OutputError where ``folder`` is a file or holds anything: nothing is ever overwritten.
    """
    refuse_taken(folder)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            if folder.is_dir():
                folder.rmdir()
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write the export: {error.strerror or error}") from error


def refuse_taken(folder: Path) -> None:
    """Raise OutputError where something is in the place of a folder to be written."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder}: not a folder; give the name of a new one")
    if folder.is_dir() and any(folder.iterdir()):
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise OutputError(
            f"{folder}: not empty ({names}), and an export overwrites nothing; give the name of a new one"
        )


def source_of(model: nn.Module) -> dict[str, Any]:
    """What an export of ``model`` is made from, JSON-ready."""
    record = adaptation(model)
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    experts = {"name": record.config.experts.name, "num_experts": record.config.experts.num_experts}
    made = {"base": base, "fingerprint": record.fingerprint, "moelora": __version__}
    return {**made, "router": record.config.router, "experts": experts, "ranks": record.config.ranks}


def write_text(path: Path, text: str) -> None:
    """A text file, on disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_lora(
    folder: Path, loras: Mapping[str, PlainLoRA], model: nn.Module, saved: bool = True
) -> dict[str, PlainLoRA]:
    """A PEFT LoRA folder, from the LoRA of every module path; modules without ranks are left out.

    saved: with the model's modules_to_save. Gives what a reader finds in it, read from the disk again. Raises
    AdapterError where no module has a rank.
    """
    used = {path: lora for path, lora in loras.items() if lora.rank}
    if not used:
        raise AdapterError(f"{folder.name}: nothing is added to any layer, so there is no LoRA to write")
    whole = saved_modules(model) if saved else {}
    tensors: dict[str, Tensor] = {}
    for path, lora in used.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = lora.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = lora.B
        tensors.update({f"{PREFIX}{path}.{SUFFIXES[name]}": value for name, value in lora.vectors.items()})
    for path, module in whole.items():
        tensors.update({f"{PREFIX}{path}.{key}": value for key, value in module.state_dict().items()})
    folder.mkdir(parents=True, exist_ok=True)
    own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}  # no two share memory
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    with open(folder / WEIGHTS, "rb+") as file:
        os.fsync(file.fileno())
    write_text(folder / CONFIG, json.dumps(_config(used, model, list(whole)), indent=2) + "\n")
    found = read_lora(folder)
    for path, lora in used.items():
        again = found[path]
        halves = torch.equal(again.A, own[f"{PREFIX}{path}.lora_A.weight"]) and again.B.shape == lora.B.shape
        if not halves or abs(again.scale - lora.scale) > 1e-6 * abs(lora.scale):
            raise AdapterError(f"{folder}: '{path}' is not on the disk as it was written; is the disk sound?")
    return found


def read_lora(folder: Path) -> dict[str, PlainLoRA]:
    """What ``write_lora`` wrote, by module path, scales as its configuration says."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            alpha = config.get("alpha_pattern", {}).get(_pattern(path), config["lora_alpha"])
            rank = config.get("rank_pattern", {}).get(_pattern(path), config["r"])
            if rank != A.shape[0]:
                raise AdapterError(f"{folder}: '{path}' has rank {A.shape[0]}, and {CONFIG} says {rank}")
            beside = {name: tensors.get(f"{PREFIX}{path}.{suffix}") for name, suffix in SUFFIXES.items()}
            vectors = {name: value for name, value in beside.items() if value is not None}
            found[path] = PlainLoRA(A, tensors[f"{PREFIX}{path}.lora_B.weight"], alpha / rank, vectors)
    return found


def _config(loras: Mapping[str, PlainLoRA], model: nn.Module, saved: list[str]) -> dict[str, Any]:
    """adapter_config.json; ranks and alphas that are not the usual ones are in the patterns."""
    ranks = {path: lora.rank for path, lora in loras.items()}
    alphas = {path: _alpha(lora) for path, lora in loras.items()}
    usual = Counter((ranks[path], alphas[path]) for path in loras).most_common(1)[0][0]
    named = {layer.site.name: layer for layer in routed_layers(model)}
    beside = {name for lora in loras.values() for name in lora.vectors}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": usual[0],
        "lora_alpha": usual[1],
        "rank_pattern": {_pattern(path): rank for path, rank in ranks.items() if rank != usual[0]},
        "alpha_pattern": {_pattern(path): alpha for path, alpha in alphas.items() if alpha != usual[1]},
        "target_modules": list(loras),
        "modules_to_save": saved or None,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(isinstance(named[path].base_layer, Conv1D) for path in loras),
        "bias": "lora_only" if "base_bias" in beside else "none",
        "lora_bias": "bias" in beside,
        "use_dora": "magnitude" in beside,
        "inference_mode": True,
    }


def _alpha(lora: PlainLoRA) -> float | int:
    """lora_alpha of a scale that may be a rounded float32."""
    alpha = float(f"{lora.scale * lora.rank:.7g}")
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(path: str) -> str:
    """A key of rank_pattern or alpha_pattern that matches this module alone."""
    return "^" + path.replace(".", r"\.")
