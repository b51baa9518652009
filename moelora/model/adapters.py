"""Reading the experts of saved adapters, stacked as the layers hold them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moelora.core.errors import AdapterError
from moelora.experts.base import Experts
from moelora.experts.core import joint_core_space
from moelora.io.folder import MANIFEST, Manifest, read_json, read_manifest, read_tensors
from moelora.io.peft import CONFIG, LoRATensors, read_peft
from moelora.model.config import AdapterConfig
from moelora.model.layer import RoutedLinear
from moelora.model.record import main_process

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


@dataclass(frozen=True)
class TrainedLoRA:
    """A [r, D], B [O, r] and scale of one expert at one site, and the folder it is from."""

    A: Tensor
    B: Tensor
    scale: float
    folder: Path


@torch.no_grad()
def fill_from_adapters(layers: Mapping[str, RoutedLinear], config: AdapterConfig, fingerprint: str | None) -> None:
    """Give the layers the experts of ``config.experts.adapters``, folder after folder.

    fingerprint: that of the base model; another one in a folder is said in a warning.

    A folder is one that moelora wrote, with all its experts, or a PEFT LoRA, which is one expert; where a PEFT LoRA has
    no module for a layer, its expert adds nothing there. LoRA experts keep their own scale, and ranks below r are
    filled up with zeros, which is exact. Core experts take any rank; a core space too small for all is said in a
    warning. Raises AdapterError unless the folders hold plain LoRAs for these layers, as many as there are experts,
    and, for LoRA experts, of no higher rank.
    """
    folders = [Path(folder) for folder in config.experts.adapters]
    if not folders:
        return
    parts = [experts_of(folder, layers) for folder in folders]
    saved = [read_manifest(folder) for folder in folders if (folder / MANIFEST).is_file()]
    others = [manifest.base.model for manifest in saved if manifest.base.fingerprint not in (fingerprint, None)]
    if others and fingerprint is not None and main_process():
        warnings.warn(
            f"experts.adapters: some were trained beside other weights than this model's, of '{others[0]}'",
            stacklevel=2,
        )
    errors: dict[str, float] = {}
    for path, layer in layers.items():
        loras = [lora for part in parts for lora in part[path]]
        if len(loras) != layer.experts.num_experts:
            raise AdapterError(
                f"experts.adapters: {len(loras)} experts in {', '.join(map(str, folders))}, but num_experts is "
                f"{layer.experts.num_experts} at '{path}'"
            )
        names = {name for name, _ in layer.experts.named_parameters()}
        if names == {"lora_A", "lora_B"} and "own_A" in layer.experts.gives:
            _stack(layer.experts, loras, config)
        elif names == {"lora_A", "core", "lora_B"} and "core" in layer.experts.gives:
            errors[path] = _project(layer.experts, loras)
        else:
            raise AdapterError(f"experts.adapters: experts '{config.experts.name}' cannot start from LoRA adapters")
    worst = max(errors, key=errors.__getitem__, default="")
    if errors.get(worst, 0) > 1e-6 and main_process():
        ranks = sum(lora.A.shape[0] for part in parts for lora in part[worst])
        warnings.warn(
            f"experts.adapters: a core space of rank {config.experts.r} does not hold all of these LoRAs: at '{worst}' "
            f"{100 * errors[worst]:.3g} % of them is lost (relative Frobenius norm, worst layer); r: {ranks} is exact",
            stacklevel=2,
        )


def _stack(experts: Experts, loras: list[TrainedLoRA], config: AdapterConfig) -> None:
    r = config.experts.r
    for lora in loras:
        if lora.A.shape[0] > r:
            highest = max(other.A.shape[0] for other in loras)
            raise AdapterError(f"{lora.folder}: rank {lora.A.shape[0]}, but r is {r} here; set experts.r to {highest}")
    held = dict(experts.named_parameters())
    for parameter in held.values():
        parameter.zero_()
    for index, lora in enumerate(loras):
        ranks = slice(index * r, index * r + lora.A.shape[0])
        held["lora_A"][ranks].copy_(lora.A)
        held["lora_B"][:, ranks].copy_(lora.B)
        if lora.A.shape[0]:
            experts.scale[index * r : (index + 1) * r] = lora.scale


def _project(experts: Experts, loras: list[TrainedLoRA]) -> float:
    """Put LoRAs into the core space of the experts, scales into the cores; gives the relative error.

    Where the space has room left, A and the cores keep their random start there and B is zero, so nothing is added and
    everything can learn.
    """
    held = dict(experts.named_parameters())
    own = float(experts.scale[0])
    scaled = [(lora.A, lora.B.double() * (lora.scale / own)) for lora in loras]
    A, core, B, error = joint_core_space(scaled, held["lora_A"].shape[0])
    into, out = A.shape[0], B.shape[1]
    held["lora_A"][:into] = A.to(held["lora_A"])
    held["lora_B"].zero_()[:, :out] = B.to(held["lora_B"])
    held["core"][:, :out] = 0
    held["core"][:, :out, :into] = core.to(held["core"])
    return error


def experts_of(folder: Path, layers: Mapping[str, RoutedLinear]) -> dict[str, list[TrainedLoRA]]:
    """The experts of a folder at every site, in order."""
    if (folder / CONFIG).is_file() and not (folder / MANIFEST).is_file():
        return _peft_expert(folder, layers)
    if not (folder / MANIFEST).is_file():
        raise AdapterError(
            f"{folder}: no adapter here; expected {MANIFEST} (written by moelora) or a PEFT LoRA's {CONFIG}"
        )
    manifest = read_manifest(folder)
    sites = {site.name for site in manifest.sites}
    if sites != layers.keys():
        raise AdapterError(
            f"{folder}: its experts are for other layers (only there {sorted(sites - layers.keys())[:2]}, only here "
            f"{sorted(layers.keys() - sites)[:2]}); use the same target_modules"
        )
    where = [folder / "experts" / name for name in manifest.experts]
    usual: list[float] = []  # scales, where the experts did not keep their own
    for path in where:
        said = f"experts/{path.name}/{CONFIG}"
        if said not in manifest.files:
            raise AdapterError(f"{folder}: its experts are not plain LoRAs, so others cannot start from them")
        values = read_json(folder, manifest, said)
        usual.append(values["lora_alpha"] / values["r"])
    config = AdapterConfig.model_validate(manifest.adapter)
    tensors, r = merged_tensors(folder, manifest, config), config.experts.r
    found: dict[str, list[TrainedLoRA]] = {}
    for site in sites:
        A, B = tensors[f"{site}.experts.lora_A"].split(r), tensors[f"{site}.experts.lora_B"].split(r, dim=1)
        kept = tensors.get(f"{site}.experts.scale")
        scales = usual if kept is None else kept[::r].tolist()
        halves = zip(A, B, scales, where, strict=False)  # some layers may have fewer
        found[site] = [TrainedLoRA(half_A, half_B, scale, path) for half_A, half_B, scale, path in halves]
    return found


def _peft_expert(folder: Path, layers: Mapping[str, RoutedLinear]) -> dict[str, list[TrainedLoRA]]:
    tensors = read_peft(folder).tensors
    beyond = sorted(tensors.keys() - layers.keys())
    if beyond:
        raise AdapterError(
            f"{folder}: it adapts '{beyond[0]}' ({len(beyond)} such modules), which is not an adapted layer here; "
            "add it to target_modules"
        )
    found = {}
    for path, layer in layers.items():
        site = layer.site
        absent = LoRATensors(torch.zeros(0, site.in_features), torch.zeros(site.out_features, 0), 1.0)
        lora = tensors.get(path, absent)
        shape = (lora.B.shape[0], lora.A.shape[1])
        if shape != (site.out_features, site.in_features):
            raise AdapterError(
                f"{folder}: made for a '{path}' of {shape[1]} -> {shape[0]} features, here it has "
                f"{site.in_features} -> {site.out_features}; load it with its own base model"
            )
        found[path] = [TrainedLoRA(lora.A, lora.B, lora.scale, folder)]
    return found
