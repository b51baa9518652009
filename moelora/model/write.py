"""write: an adapted model's experts, router and configuration as a folder."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora import __version__
from moelora.core.errors import AdapterError, OutputError
from moelora.io.folder import MANIFEST, Pin, write_folder
from moelora.io.peft import CONFIG, PREFIX, WEIGHTS
from moelora.model.adapters import is_lora
from moelora.model.config import AdapterConfig
from moelora.model.layer import RoutedLinear
from moelora.model.partition import wholes
from moelora.model.record import Adaptation, adaptation, main_process, routed_layers
from moelora.model.saved import saved_modules

ROUTER_FILE = "router.safetensors"
SUFFIXES = {"bias": "lora_B.bias", "magnitude": "lora_magnitude_vector", "base_bias": "base_layer.bias"}
"""What an expert has beside its halves, and how PEFT calls it in a file."""


def refuse_foreign(folder: Path) -> None:
    """Raise OutputError if ``folder`` is a file, or holds files and no adapter."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise OutputError(f"{folder}: not empty and not written by moelora ({names}); choose another folder")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: a file; expected a folder")


def write(model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None = None, pinned: bool = False) -> None:
    """``save`` without the check; state_dict: full tensors by parameter name, if they were gathered already.

    Called by all processes of a run: they gather what an engine holds in parts, and the first of them writes.
    """
    record = adaptation(model)
    pins = _pins(record) if pinned else {}
    state = wholes(adapter_tensors(model), main_process()) if state_dict is None else state_dict
    if not main_process():
        return
    layers = {layer.site.name: layer for layer in routed_layers(model)}
    rest = {name: _find(state, name) for name in layer_tensors(layers)}
    for path, module in saved_modules(model).items():
        rest.update({f"{path}.trained.{key}": _find(state, f"{path}.trained.{key}") for key in module.state_dict()})
    experts = {name: _Expert() for name in _expert_names(record.config)}
    for path, layer in layers.items():
        if is_lora(layer.experts):
            halves = [_find(state, f"{path}.experts.{half}") for half in ("lora_A", "lora_B")]
            for index, expert in enumerate(list(experts.values())[: layer.experts.num_experts]):
                expert.add(layer, index, *halves)
    files: dict[str, dict[str, Tensor] | str] = {"README.md": _card(record, model)}
    files[ROUTER_FILE] = {key: value.detach().cpu() for key, value in rest.items()}
    for name, expert in experts.items():
        if expert.tensors and name not in pins:
            files[f"experts/{name}/{WEIGHTS}"] = expert.tensors
            files[f"experts/{name}/{CONFIG}"] = _peft_config(expert, record, model)
    config = getattr(model, "config", None)
    write_folder(
        folder,
        {
            "moelora": __version__,
            "base": {
                "model": getattr(config, "_name_or_path", "") or type(model).__name__,
                "revision": getattr(config, "_commit_hash", None),
                "cls": type(model).__name__,
                "fingerprint": record.fingerprint,
            },
            "adapter": record.config.model_dump(),
            "sites": [
                {"name": s.name, "in_features": s.in_features, "out_features": s.out_features} for s in record.sites
            ],
            "experts": list(experts),
            "pins": {name: pin.model_dump() for name, pin in pins.items()},
        },
        files,
    )


def upload(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Write the adapter to a repository of the hub, which is made if it is not there; gives the commit's address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            write(model, Path(folder))
            return api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message or "Upload the adapter",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            ).commit_url
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OutputError(f"{repo_id}: cannot upload the adapter: {str(error).splitlines()[0]}") from error


def _pins(record: Adaptation) -> dict[str, Pin]:
    names = _expert_names(record.config)
    if record.config.experts.train != "none" or not record.pins or None in record.pins:
        free = next((n for n, pin in zip(names, record.pins, strict=False) if pin is None), names[0])
        raise OutputError(
            f"{free} can be saved as a copy only: experts are pinned when all are from the hub and frozen "
            f"(experts.train: none), found experts.train: {record.config.experts.train}"
        )
    return {name: pin for name, pin in zip(names, record.pins, strict=True) if pin is not None}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that an adapter saves, by name in the adapted model: parameters and persistent buffers but the base's.

    What several layers share goes by the name it has in the first of them.
    """
    layers = {layer.site.name: layer for layer in routed_layers(model)}
    found = layer_tensors(layers, with_experts=True)
    for path, module in saved_modules(model).items():
        found.update({f"{path}.trained.{key}": value for key, value in module.state_dict(keep_vars=True).items()})
    return found


def layer_tensors(layers: Mapping[str, RoutedLinear], with_experts: bool = False) -> dict[str, Tensor]:
    """The tensors of layers, by name; those of LoRA experts, which have folders of their own, only if asked for."""
    found, seen = {}, set()
    for path, layer in layers.items():
        apart = {"experts.lora_A", "experts.lora_B"} if is_lora(layer.experts) and not with_experts else set()
        for key, value in layer.state_dict(keep_vars=True).items():
            if not key.startswith("base_layer.") and id(value) not in seen and key not in apart:
                seen.add(id(value))
                found[f"{path}.{key}"] = value
    return found


@dataclass
class _Expert:
    """One expert as PEFT would save it: at its own rank, in the layers it has."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rank: dict[str, int] = field(default_factory=dict)
    alpha: dict[str, float] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    bias: str = "lora_only"

    def add(self, layer: RoutedLinear, index: int, A: Tensor, B: Tensor) -> None:
        experts, path = layer.experts, layer.site.name
        rank, start, vectors = experts.ranks[index], index * experts.r, experts.vectors[index]
        parts: dict[str, Tensor] = {SUFFIXES[part]: value for part, value in vectors.items()}
        if rank:
            parts["lora_A.weight"] = A[start : start + rank]
            parts["lora_B.weight"] = B[:, start : start + rank]
            self.rank[path], self.alpha[path] = rank, float(experts.scale[start]) * rank
        elif vectors:  # bias: all has trained the bias of a layer without LoRA
            parts = {"bias": vectors["base_bias"]}
            self.bias = "all"
        self.parts.update(vectors)
        self.tensors.update({f"{PREFIX}{path}.{key}": value.detach().cpu() for key, value in parts.items()})


def _find(state: dict[str, Tensor], key: str) -> Tensor:
    for name in (key, f"module.{key}"):
        if name in state:
            return state[name]
    raise AdapterError(f"{key}: not in the state to be saved, which has {len(state)} other entries")


def _expert_names(config: AdapterConfig) -> list[str]:
    width = len(str(config.experts.most - 1))
    return [f"expert_{index:0{width}d}" for index in range(config.experts.most)]


def _peft_config(expert: _Expert, record: Adaptation, model: nn.Module) -> str:
    ranks, alphas = (Counter(values.values()).most_common(1) for values in (expert.rank, expert.alpha))
    rank, alpha = ranks[0][0] if ranks else record.config.experts.r, alphas[0][0] if alphas else 1
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": rank,
        "rank_pattern": {site: value for site, value in expert.rank.items() if value != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {site: value for site, value in expert.alpha.items() if value != alpha},
        "target_modules": list(expert.rank),
        "lora_dropout": record.config.experts.lora_dropout,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in routed_layers(model)),
        "bias": expert.bias if "base_bias" in expert.parts else "none",
        "lora_bias": "bias" in expert.parts,
        "use_dora": "magnitude" in expert.parts,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n"


def _card(record: Adaptation, model: nn.Module) -> str:
    config = record.config
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    experts, router = config.experts, dict(config.router)
    name = router.pop("name")
    options = ", ".join(f"{key}={value}" for key, value in router.items())
    plain = any(not isinstance(layer.router, record.router) for layer in routed_layers(model))
    beside = " The first holds the LoRAs of attention, too, which are on beside every expert." if plain else ""
    return f"""---
library_name: moelora
tags: [lora, mixture-of-experts, moelora]
---

# A mixture of LoRA experts for `{base}`

{experts.most} x {experts.name} experts of rank {experts.r}, router `{name}`{f" ({options})" if options else ""},
{len(record.sites)} adapted layers.

```python
import moelora
from transformers import AutoModelForCausalLM

model = moelora.load(AutoModelForCausalLM.from_pretrained("{base}"), "PATH_OR_HUB_ID_OF_THIS_FOLDER")
```

Each folder in `experts/` is a plain PEFT LoRA. Alone it is that expert always on, without the router.{beside}
"""
