"""write: an adapted model's experts, router and configuration as a folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora import __version__
from moelora.core.errors import AdapterError, OutputError
from moelora.io.folder import MANIFEST, write_folder
from moelora.model.adapters import PEFT_PREFIX, ROUTER_FILE
from moelora.model.config import AdapterConfig
from moelora.model.layer import RoutedLinear
from moelora.model.record import Adaptation, adaptation, routed_layers
from moelora.model.saved import saved_modules


def refuse_foreign(folder: Path) -> None:
    """Raise OutputError if ``folder`` is a file, or holds files and no adapter."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise OutputError(f"{folder}: not empty and not written by moelora ({names}); choose another folder")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: a file; expected a folder")


def write(model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """``save`` without the check; state_dict: full tensors by parameter name, where the model holds only shards."""
    record = adaptation(model)
    state = model.state_dict() if state_dict is None else state_dict
    experts: dict[str, dict[str, Tensor]] = {name: {} for name in _expert_names(record.config)}
    rest = {name: _find(state, name) for name in adapter_tensors(model)}
    alpha: dict[str, dict[str, float]] = {name: {} for name in experts}
    conv1d = False
    for layer in routed_layers(model):
        prefix = layer.site.name
        conv1d = conv1d or isinstance(layer.base_layer, Conv1D)
        start = f"{prefix}."
        own = {name.removeprefix(start): rest.pop(name) for name in list(rest) if name.startswith(start)}
        if _is_lora(layer):
            for index, (name, tensors) in enumerate(list(experts.items())[: layer.experts.num_experts]):
                rows = slice(index * layer.experts.r, (index + 1) * layer.experts.r)
                alpha[name][prefix] = float(layer.experts.scale[rows.start]) * layer.experts.r
                tensors[f"{PEFT_PREFIX}{prefix}.lora_A.weight"] = own["experts.lora_A"][rows]
                tensors[f"{PEFT_PREFIX}{prefix}.lora_B.weight"] = own["experts.lora_B"][:, rows]
            own = {key: value for key, value in own.items() if key not in ("experts.lora_A", "experts.lora_B")}
        rest.update({f"{prefix}.{key}": value for key, value in own.items()})

    files: dict[str, dict[str, Tensor] | str] = {"README.md": _card(record, model)}
    files[ROUTER_FILE] = {key: value.detach().cpu() for key, value in rest.items()}
    for name, tensors in experts.items():
        if tensors:
            files[f"experts/{name}/adapter_model.safetensors"] = {k: v.detach().cpu() for k, v in tensors.items()}
            files[f"experts/{name}/adapter_config.json"] = _peft_config(record, model, alpha[name], conv1d)
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
        },
        files,
    )


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that an adapter saves, by name in the adapted model: parameters and persistent buffers but the base's.

    What several layers share goes by the name it has in the first of them.
    """
    found, seen = {}, set()
    for layer in routed_layers(model):
        for key, value in layer.state_dict(keep_vars=True).items():
            if not key.startswith("base_layer.") and id(value) not in seen:
                seen.add(id(value))
                found[f"{layer.site.name}.{key}"] = value
    for path, module in saved_modules(model).items():
        found.update({f"{path}.trained.{key}": value for key, value in module.state_dict(keep_vars=True).items()})
    return found


def _is_lora(layer: RoutedLinear) -> bool:
    """Whether every expert of the layer is a LoRA of its own."""
    names = {name for name, _ in layer.experts.named_parameters()}
    return names == {"lora_A", "lora_B"} and "own_A" in layer.experts.gives


def _find(state: dict[str, Tensor], key: str) -> Tensor:
    for name in (key, f"module.{key}"):
        if name in state:
            return state[name]
    raise AdapterError(f"{key}: not in the state to be saved, which has {len(state)} other entries")


def _expert_names(config: AdapterConfig) -> list[str]:
    width = len(str(config.experts.most - 1))
    return [f"expert_{index:0{width}d}" for index in range(config.experts.most)]


def _peft_config(record: Adaptation, model: nn.Module, alpha: dict[str, float], conv1d: bool) -> str:
    """alpha: lora_alpha by the layers that the expert has."""
    usual = Counter(alpha.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": record.config.experts.r,
        "lora_alpha": usual,
        "alpha_pattern": {site: value for site, value in alpha.items() if value != usual},
        "target_modules": list(alpha),
        "lora_dropout": record.config.experts.lora_dropout,
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n"


def _card(record: Adaptation, model: nn.Module) -> str:
    config = record.config
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    experts, router = config.experts, dict(config.router)
    name = router.pop("name")
    options = ", ".join(f"{key}={value}" for key, value in router.items())
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

Each folder in `experts/` is a plain PEFT LoRA. Alone it is that expert always on, without the router.
"""
