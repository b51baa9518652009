"""Reading the experts of saved adapters, stacked as the layers hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moelora.core.errors import AdapterError
from moelora.io.folder import Manifest, read_manifest, read_tensors
from moelora.model.config import AdapterConfig
from moelora.model.layer import RoutedLinear

ROUTER_FILE = "router.safetensors"
PEFT_PREFIX = "base_model.model."


def merged_tensors(folder: Path, manifest: Manifest, config: AdapterConfig) -> dict[str, Tensor]:
    """All tensors by module path, the experts' halves stacked again."""
    files = read_tensors(folder, manifest)
    merged = dict(files.get(ROUTER_FILE, {}))
    parts = [files.get(f"experts/{name}/adapter_model.safetensors", {}) for name in manifest.experts]
    everywhere = isinstance(config.experts.num_experts, int)
    for name, part in zip(manifest.experts, parts, strict=True):
        for key in sorted(parts[0].keys() ^ part.keys()):
            has, lacks = (manifest.experts[0], name) if key in parts[0] else (name, manifest.experts[0])
            if everywhere or lacks == manifest.experts[0]:  # with a list, some layers have fewer experts
                raise AdapterError(f"{folder}/experts/{lacks}: no tensor {key}, which {has} has")
        for key, value in part.items():
            if value.shape != parts[0][key].shape:
                raise AdapterError(
                    f"{folder}/experts/{name}: tensor {key} is {tuple(value.shape)}, in {manifest.experts[0]} "
                    f"{tuple(parts[0][key].shape)}"
                )
    for key in parts[0] if parts else ():
        path, _, half = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
        stack = [part[key] for part in parts if key in part]
        merged[f"{path}.experts.{half}"] = torch.cat(stack, dim=0 if half == "lora_A" else 1)
    return merged


@torch.no_grad()
def fill_from_adapters(layers: Mapping[str, RoutedLinear], config: AdapterConfig) -> None:
    """Give the layers the experts of ``config.experts.adapters``, folder after folder.

    Raises AdapterError unless they are plain LoRA experts for just these layers, of this rank and scale, and as many.
    """
    folders = [Path(folder) for folder in config.experts.adapters]
    if not folders:
        return
    parts = [_experts_of(folder, config, layers) for folder in folders]
    for path, layer in layers.items():
        held = dict(layer.experts.named_parameters())
        if held.keys() != {"lora_A", "lora_B"} or "own_A" not in layer.experts.gives:
            raise AdapterError(f"experts.adapters: experts '{config.experts.name}' cannot start from LoRA adapters")
        for half, axis in (("lora_A", 0), ("lora_B", 1)):
            stacked = torch.cat([part[f"{path}.experts.{half}"] for part in parts], dim=axis)
            if stacked.shape != held[half].shape:
                found = stacked.shape[axis] // config.experts.r
                raise AdapterError(
                    f"experts.adapters: {found} experts in {', '.join(map(str, folders))}, but num_experts is "
                    f"{layer.experts.num_experts} at '{path}'"
                )
            held[half].copy_(stacked)


def _experts_of(folder: Path, config: AdapterConfig, layers: Mapping[str, RoutedLinear]) -> dict[str, Tensor]:
    manifest = read_manifest(folder)
    sites = {site.name for site in manifest.sites}
    if sites != layers.keys():
        raise AdapterError(
            f"{folder}: its experts are for other layers (only there {sorted(sites - layers.keys())[:2]}, only here "
            f"{sorted(layers.keys() - sites)[:2]}); use the same target_modules"
        )
    for name in manifest.experts:
        said = folder / "experts" / name / "adapter_config.json"
        if not said.is_file():
            raise AdapterError(f"{folder}: its experts are not plain LoRAs, so others cannot start from them")
        values = json.loads(said.read_text(encoding="utf-8"))
        scale, own = values["lora_alpha"] / values["r"], float(next(iter(layers.values())).experts.scale[0])
        if values["r"] != config.experts.r or abs(scale - own) > 1e-6 * abs(own):
            raise AdapterError(
                f"{said}: rank {values['r']} and scale {scale:g}, but r is {config.experts.r} here and the scale "
                f"(lora_alpha by rank) {own:g}; set experts.r and experts.lora_alpha to fit"
            )
    return merged_tensors(folder, manifest, AdapterConfig.model_validate(manifest.adapter))
