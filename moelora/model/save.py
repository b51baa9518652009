"""save and load: an adapted model to a folder and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora import __version__
from moelora.core.errors import AdapterError, OutputError
from moelora.core.methods import Methods
from moelora.io.folder import MANIFEST, Manifest, read_manifest, read_tensors, write_folder
from moelora.model.adapt import _main_process, attach, fingerprint, print_table
from moelora.model.config import AdapterConfig, build_site, resolve
from moelora.model.routed import Adaptation, adaptation, routed_layers
from moelora.targets.named import select

Base = TypeVar("Base", bound=nn.Module)

ROUTER_FILE = "router.safetensors"
_PEFT = "base_model.model."


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter of ``model`` to ``folder``: experts, router, configuration, base fingerprint, model card.

    Raises OutputError when the folder holds files that are not an adapter's, and writes nothing then.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    write(model, folder)


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
    rest: dict[str, Tensor] = {}
    alpha: dict[str, float] = {}
    conv1d = False
    for layer in routed_layers(model):
        prefix = layer.site.name
        conv1d = conv1d or isinstance(layer.base_layer, Conv1D)
        own = {key: _find(state, f"{prefix}.{key}") for key in _adapter_keys(layer)}
        if _is_lora(own):
            for index, tensors in enumerate(experts.values()):
                rows = slice(index * layer.experts.r, (index + 1) * layer.experts.r)
                tensors[f"{_PEFT}{prefix}.lora_A.weight"] = own["experts.lora_A"][rows]
                tensors[f"{_PEFT}{prefix}.lora_B.weight"] = own["experts.lora_B"][:, rows]
            own = {key: value for key, value in own.items() if not key.startswith("experts.")}
            alpha[prefix] = float(layer.experts.scale[0]) * layer.experts.r
        rest.update({f"{prefix}.{key}": value for key, value in own.items()})

    files: dict[str, dict[str, Tensor] | str] = {"README.md": _card(record, model)}
    files[ROUTER_FILE] = {key: value.detach().cpu() for key, value in rest.items()}
    for name, tensors in experts.items():
        if tensors:
            files[f"experts/{name}/adapter_model.safetensors"] = {k: v.detach().cpu() for k, v in tensors.items()}
            files[f"experts/{name}/adapter_config.json"] = _peft_config(record, model, alpha, conv1d)
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


def load(
    base_model: Base,
    adapter: str | Path,
    *,
    plugins: Iterable[str | Path] = (),
    revision: str | None = None,
    force: bool = False,
    verbose: bool = False,
) -> Base:
    """Put a saved adapter into a fresh base model and return it: the same object with experts.

    adapter: a folder written by ``save`` or a training run, or a hub id (``revision`` pins it). Everything is checked
    against the model before the model is touched. Raises AdapterError for a damaged folder, or a base model other than
    the adapter's (``force`` skips the comparison of weights).

        model = moelora.load(AutoModelForCausalLM.from_pretrained(base), "out/run")
    """
    folder = _folder(adapter, revision)
    manifest = read_manifest(folder)
    methods = Methods(plugins)
    config = resolve(manifest.adapter, methods)
    tensors = _merge(folder, manifest, config)
    _check_base(base_model, manifest, config, folder, force)
    _check_shapes(base_model, config, methods, tensors, folder)
    attach(base_model, config, methods, initialise=False)
    fill(base_model, tensors)
    if verbose and _main_process():
        print_table(base_model)
    return base_model


def restore(model: nn.Module, folder: str | Path) -> None:
    """Read a saved adapter's tensors into a model that is adapted in the same way already (resuming a run)."""
    record, path = adaptation(model), Path(folder)
    manifest = read_manifest(path)
    if manifest.adapter != record.config.model_dump():
        changed = [k for k, v in record.config.model_dump().items() if manifest.adapter.get(k) != v]
        raise AdapterError(f"{path}: saved with another adapter configuration (differs in {', '.join(changed)})")
    tensors = _merge(path, manifest, record.config)
    _match({f"{layer.site.name}.{k}": v.shape for layer in routed_layers(model) for k, v in _own(layer)}, tensors, path)
    fill(model, tensors)


@torch.no_grad()
def fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy adapter tensors into the layers of an adapted model."""
    for layer in routed_layers(model):
        for key, value in _own(layer):
            value.copy_(tensors[f"{layer.site.name}.{key}"])


def _own(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and tensor of all that an adapter saves of a layer: parameters and persistent buffers but the base's."""
    return [
        (key, value) for key, value in layer.state_dict(keep_vars=True).items() if not key.startswith("base_layer.")
    ]


def _adapter_keys(layer: nn.Module) -> list[str]:
    return [key for key, _ in _own(layer)]


def _is_lora(own: Iterable[str]) -> bool:
    return {key for key in own if key.startswith("experts.")} == {"experts.lora_A", "experts.lora_B"}


def _find(state: dict[str, Tensor], key: str) -> Tensor:
    for name in (key, f"module.{key}"):
        if name in state:
            return state[name]
    raise AdapterError(f"{key}: not in the state to be saved, which has {len(state)} other entries")


def _expert_names(config: AdapterConfig) -> list[str]:
    width = len(str(config.experts.num_experts - 1))
    return [f"expert_{index:0{width}d}" for index in range(config.experts.num_experts)]


def _merge(folder: Path, manifest: Manifest, config: AdapterConfig) -> dict[str, Tensor]:
    """All tensors by module path, the experts' halves stacked again."""
    files = read_tensors(folder, manifest)
    merged = dict(files.get(ROUTER_FILE, {}))
    parts = [files.get(f"experts/{name}/adapter_model.safetensors", {}) for name in manifest.experts]
    for key in parts[0] if parts else ():
        path, _, half = key.removeprefix(_PEFT).removesuffix(".weight").rpartition(".")
        missing = [name for name, part in zip(manifest.experts, parts, strict=True) if key not in part]
        if missing:
            raise AdapterError(f"{folder}/experts/{missing[0]}: no tensor {key}, which {manifest.experts[0]} has")
        merged[f"{path}.experts.{half}"] = torch.cat([part[key] for part in parts], dim=0 if half == "lora_A" else 1)
    return merged


def _check_base(model: nn.Module, manifest: Manifest, config: AdapterConfig, folder: Path, force: bool) -> None:
    sites = select(
        model, config.target_modules, config.exclude_modules, config.layers_to_transform, config.layers_pattern
    )
    here = [(site.name, site.in_features, site.out_features) for site in sites]
    saved = [(site.name, site.in_features, site.out_features) for site in manifest.sites]
    if here != saved:
        extra, absent = [s for s in here if s not in saved], [s for s in saved if s not in here]
        raise AdapterError(
            f"{folder}: made for {manifest.base.cls} '{manifest.base.model}' with {len(saved)} adapted layers; in this "
            f"{type(model).__name__} they differ: not here {absent[:2]}, only here {extra[:2]}"
        )
    own = fingerprint(model, [site.name for site in sites])
    if not force and None not in (own, manifest.base.fingerprint) and own != manifest.base.fingerprint:
        raise AdapterError(
            f"{folder}: made for the weights of '{manifest.base.model}' (fingerprint {manifest.base.fingerprint}), and "
            f"this model has others ({own}); load the right base model, or pass force=True"
        )


def _check_shapes(
    model: nn.Module, config: AdapterConfig, methods: Methods, tensors: dict[str, Tensor], folder: Path
) -> None:
    sites = select(
        model, config.target_modules, config.exclude_modules, config.layers_to_transform, config.layers_pattern
    )
    expected: dict[str, torch.Size] = {}
    with torch.device("meta"):
        for site in sites:
            router, experts = build_site(config, methods, site)
            for part, module in (("router", router), ("experts", experts)):
                expected.update({f"{site.name}.{part}.{k}": v.shape for k, v in module.state_dict().items()})
    _match(expected, tensors, folder)


def _match(expected: dict[str, torch.Size], tensors: dict[str, Tensor], folder: Path) -> None:
    for key in sorted(expected.keys() ^ tensors.keys()):
        problem = "missing" if key in expected else "not part of this adapter"
        raise AdapterError(f"{folder}: tensor {key} is {problem}")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise AdapterError(f"{folder}: tensor {key} is {tuple(tensors[key].shape)}, expected {tuple(shape)}")


def _folder(adapter: str | Path, revision: str | None) -> Path:
    path = Path(adapter)
    if path.is_dir() or path.exists() or len(path.parts) != 2:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [
        MANIFEST,
        ROUTER_FILE,
        "experts/*/adapter_config.json",
        "experts/*/adapter_model.safetensors",
        "README.md",
    ]
    try:
        return Path(snapshot_download(str(adapter), revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(f"{adapter}: no such folder, and not readable from the hub: {error}") from error


def _peft_config(record: Adaptation, model: nn.Module, alpha: dict[str, float], conv1d: bool) -> str:
    import json

    values = sorted(set(alpha.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": record.config.experts.r,
        "lora_alpha": values[0],
        "target_modules": [site.name for site in record.sites],
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

{experts.num_experts} x {experts.name} experts of rank {experts.r}, router `{name}`{f" ({options})" if options else ""},
{len(record.sites)} adapted layers.

```python
import moelora
from transformers import AutoModelForCausalLM

model = moelora.load(AutoModelForCausalLM.from_pretrained("{base}"), "PATH_OR_HUB_ID_OF_THIS_FOLDER")
```

Each folder in `experts/` is a plain PEFT LoRA. Alone it is that expert always on, without the router.
"""
