"""Adapters on their way to become experts: found, and held against the model before a tensor is read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moelora.core.errors import AdapterError
from moelora.core.tape import Site
from moelora.core.validate import nearest
from moelora.io.files import fail, sha256_of, short
from moelora.io.folder import MANIFEST, BaseInfo, Manifest, Pin, read_manifest
from moelora.io.hub import Located, locate
from moelora.io.patterns import Budget
from moelora.io.peft import CONFIG, WEIGHTS, LoRATensors, PeftAdapter, read_peft
from moelora.model.config import AdapterConfig
from moelora.model.layer import RoutedLinear
from moelora.model.quantised import form, form_of
from moelora.model.record import main_process
from moelora.model.saved import TrainedCopy
from moelora.targets.base import block_of

NEEDS_WEIGHTS = "DoRA, PiSSA, OLoRA and trained biases need the base model's weights, and they are not there to read"


@dataclass(frozen=True)
class Source:
    """One adapter that becomes one expert.

    entry: what the recipe calls it. located: the same with the commit that was read, where it is from the hub. pin: its
    own folder there, with hashes. base: what is known of its base, in folders moelora wrote.
    """

    adapter: PeftAdapter
    entry: str
    located: str | None = None
    pin: Pin | None = None
    base: BaseInfo | None = None

    @property
    def folder(self) -> Path:
        return self.adapter.folder

    def rank(self, path: str) -> int:
        """The rank it takes in a layer; 0 where it has no LoRA."""
        module = self.adapter.modules.get(path)
        return 0 if module is None else module.rank * (2 if self.adapter.moved else 1)

    def dtype(self, path: str) -> torch.dtype | None:
        """The dtype that holds its halves in a layer exactly; None where it has none."""
        module = self.adapter.modules.get(path)
        halves = [entry.dtype for part, entry in module.entries.items() if part in "AB"] if module else []
        if not halves:
            return None
        return torch.float32 if self.adapter.moved else torch.promote_types(*halves)

    @property
    def plain(self) -> bool:
        """Whether it is LoRA and nothing beside, wherever it is."""
        return all(module.entries.keys() == {"A", "B"} for module in self.adapter.modules.values())

    def read(self, path: str, layer: nn.Module) -> LoRATensors:
        """What it adds to a base layer [D -> O]; of rank 0 where it has nothing. Raises AdapterError."""
        if path not in self.adapter.modules:
            return LoRATensors(torch.zeros(0, 0), torch.zeros(0, 0), 1.0)
        lora = self.adapter.read(path)
        return lora if self.adapter.moved is None else _moved_back(lora, layer, self.adapter)


def open_sources(entries: Iterable[str | Path]) -> list[Source]:
    """The experts of adapters, in order: a folder or hub id of a PEFT LoRA is one, of a moelora mixture all of its own.

    Reads configurations and headers, and the hashes of what moelora wrote. Raises AdapterError.
    """
    found: list[Source] = []
    for entry in entries:
        at = locate(entry)
        if (at.folder / MANIFEST).is_file():
            experts = open_saved(at, read_manifest(at.folder, at.root), str(entry))
            if not experts:
                raise AdapterError(f"{at.folder}: its experts are not plain LoRAs, so others cannot start from them")
            found += experts
        elif (at.folder / CONFIG).exists():
            pin = None if at.pin is None else _pin(at.pin, at.folder, at.root)
            found.append(Source(read_peft(at.folder, at.root), str(entry), at.pin, pin))
        else:
            raise AdapterError(
                f"{at.folder}: no adapter here; expected {MANIFEST} (written by moelora) or a PEFT LoRA's {CONFIG}"
            )
    return found


def open_saved(at: Located, manifest: Manifest, entry: str = "") -> list[Source]:
    """The experts of a folder that moelora wrote, those it only points to included; none if they are not LoRAs."""
    found = []
    for name in manifest.experts:
        folder, files = at.folder / "experts" / name, [f"experts/{name}/{file}" for file in (CONFIG, WEIGHTS)]
        if name in manifest.pins:
            found.append(_fetch_pinned(manifest.pins[name], at.folder, manifest.base))
        elif all(file in manifest.files for file in files):
            for file in files:
                check_hash(at.folder, file, manifest.files, at.root)
            pin = None
            if at.pin is not None:
                repo, _, commit = at.pin.rpartition("@")
                hashes = {file.rpartition("/")[2]: manifest.files[file] for file in files}
                pin = Pin(adapter=f"{repo}/experts/{name}@{commit}", files=hashes)
            found.append(Source(read_peft(folder, at.root), entry or str(at.folder), at.pin, pin, manifest.base))
    return found


def _fetch_pinned(pin: Pin, folder: Path, base: BaseInfo) -> Source:
    at = locate(pin.adapter)
    for file in (CONFIG, WEIGHTS):
        check_hash(at.folder, file, pin.files, at.root)
    return Source(read_peft(at.folder, at.root), str(folder), at.pin, pin, base)


def _pin(adapter: str, folder: Path, root: Path | None) -> Pin:
    return Pin(adapter=adapter, files={file: sha256_of(folder, file, root) for file in (CONFIG, WEIGHTS)})


def pinned(config: AdapterConfig, sources: Sequence[Source]) -> AdapterConfig:
    """The configuration with hub ids at the commit that was read."""
    pins = {source.entry: source.located for source in sources if source.located is not None}
    entries = [pins.get(entry, entry) for entry in config.experts.adapters]
    chosen = pins.get(config.experts.modules_from, config.experts.modules_from)
    experts = config.experts.model_copy(update={"adapters": entries, "modules_from": chosen})
    return config.model_copy(update={"experts": experts})


def check_hash(folder: Path, name: str, files: Mapping[str, str], root: Path | None) -> None:
    """Raise AdapterError unless a file is the one that a manifest means."""
    if name not in files:
        raise AdapterError(f"{folder}: no hash of {name}, so it cannot be trusted; save the adapter again")
    actual = sha256_of(folder, name, root)
    if actual != files[name]:
        raise AdapterError(
            f"{folder / name}: sha256 {actual[:12]}..., expected {files[name][:12]}...; the file was changed"
        )


def check_fit(source: Source, model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Raise AdapterError unless all that the adapter has is for these layers of the model, and all is there."""
    adapter, folder = source.adapter, source.folder
    known = _base_modules(model)
    for path, module in adapter.modules.items():
        if path in known and (adapter.moved or module.entries.keys() - {"A", "B", "bias"}) and not _there(known[path]):
            raise AdapterError(f"{folder}: {NEEDS_WEIGHTS}: '{path}' has none; load them first")
        if path in sites:
            site = sites[path]
            wide, out = module.features
            if (wide or site.in_features, out) != (site.in_features, site.out_features):
                raise AdapterError(
                    f"{folder}: made for a '{path}' of {wide} -> {out} features, here it has "
                    f"{site.in_features} -> {site.out_features}; load it with its own base model"
                )
            if "base_bias" in module.entries and bias_of(known[path]) is None:
                name = module.entries["base_bias"].name
                fail(adapter.file.path, name, "a bias", f"none, as '{path}' has none", "load its own base model")
            kept = adapter.config.get("bias", "none")
            if kept != "none" and bias_of(known[path]) is not None and "base_bias" not in module.entries:
                raise AdapterError(
                    f"{folder}: bias: {kept} has trained the bias of '{path}', which is not in the file, so it is "
                    f"lost; to take the adapter without its biases, set bias to none in {CONFIG}"
                )
        elif path not in known:
            raise AdapterError(
                f"{folder}: it adapts '{path}', and {type(model).__name__} has no such module"
                f"{nearest(path, [name for name in known if name.endswith(path.rpartition('.')[2])])}; load the base "
                "model by the class it was trained with"
            )
        elif module.entries.keys() != {"base_bias"}:
            beyond = [other for other, its in adapter.modules.items() if other not in sites and "A" in its.entries]
            raise AdapterError(
                f"{folder}: it adapts '{path}' ({len(beyond)} such modules), which is not an adapted layer here; "
                "add it to target_modules, unless it is no linear layer or the output head, which cannot have experts"
            )
        elif not _same(adapter.file.read(module.entries["base_bias"].name), bias_of(known[path])):
            raise AdapterError(
                f"{folder}: bias: {adapter.config.get('bias')} has trained the bias of '{path}', which is not an "
                "adapted layer here, so no gate can choose it; add it to target_modules if it is linear"
            )
    targeted = targets_of(known, adapter)
    absent = sorted(path for path in targeted if path not in adapter.modules)
    if absent:
        raise AdapterError(
            f"{folder}: no tensors for '{absent[0]}' ({len(absent)} such modules), which its target_modules name: the "
            "adapter is incomplete, or was made for another model; if it is whole, name its modules in target_modules"
        )
    beyond = sorted(path for path, its in adapter.modules.items() if "A" in its.entries and path not in targeted)
    if beyond and adapter.config.get("target_modules") not in (None, "all-linear"):
        raise AdapterError(
            f"{folder}: tensors for '{beyond[0]}' ({len(beyond)} such modules), which its target_modules do not name: "
            f"{CONFIG} is another adapter's; copy both files again"
        )


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model by path, in a model with experts too."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path.startswith(inside or ("\0",)):
            replaced = isinstance(module, RoutedLinear | TrainedCopy)
            inside = (*inside, f"{path}.") if replaced else inside
            found[path] = cast(nn.Module, module.base_layer if isinstance(module, RoutedLinear) else module)
    return found


def targets_of(modules: Mapping[str, nn.Module], adapter: PeftAdapter) -> set[str]:
    """The linear layers that the configuration names, by PEFT's rules; none where it does not say."""
    config = adapter.config
    budget = Budget(adapter.folder / CONFIG)
    targets, saved = config.get("target_modules"), config.get("modules_to_save") or []
    if targets is None or targets == "all-linear":
        return set()
    wanted = _rule(budget, "target_modules", targets)
    excluded = _rule(budget, "exclude_modules", config.get("exclude_modules") or [])
    blocks, pattern = config.get("layers_to_transform"), config.get("layers_pattern") or None
    wanted_blocks = [blocks] if isinstance(blocks, int) else blocks or []
    for name in [pattern] if isinstance(pattern, str) else pattern or []:
        if not re.fullmatch(r"\w{1,64}", name):
            fail(budget.path, "layers_pattern", short(name), "the name of a list of blocks", "list the modules by name")
    found = set()
    for path, layer in modules.items():
        if not isinstance(layer, nn.Linear | Conv1D) or excluded(path) or not wanted(path):
            continue
        if any(f".{name}." in f".{path}." for name in saved):
            continue
        in_blocks = not wanted_blocks or block_of(path, pattern) in wanted_blocks
        if in_blocks or isinstance(targets, str) or path in targets:  # a whole path is meant whatever its block
            found.add(path)
    return found


def _rule(budget: Budget, key: str, rule: str | list[str]) -> Callable[[str], bool]:
    if isinstance(rule, str):
        return budget.pattern(key, rule)
    names = set(rule)
    return lambda path: any(path[start:] in names for start in [0, *(m.end() for m in re.finditer(r"\.", path))])


def warn_of_other_bases(sources: list[Source], model: nn.Module, fingerprint: str | None) -> None:
    """One warning for adapters that say they were made for another base model than this."""
    own = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    others: dict[str, None] = {}
    for source in sources:
        made_for = None if source.base is None else source.base.fingerprint
        said = source.adapter.base_model if source.base is None else source.base.model
        if fingerprint is not None and made_for is not None and form_of(fingerprint) == form_of(made_for):
            if fingerprint != made_for:
                others[f"other weights than this model's, of '{said}'"] = None
        elif own and said and _short(said) != _short(own):
            others[f"'{said}', and this model is '{own}'"] = None
    if others and main_process():
        warnings.warn(f"experts.adapters: made for {'; '.join(others)}", stacklevel=3)


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()


def dense_weight(layer: nn.Module) -> Tensor:
    """W [O, D] of a base layer, in float32 at least; a quantised layer is asked what it does to the unit vectors.

    Raises AdapterError where the weights are not there (meta device, partitioned).
    """
    weight = cast(Tensor, layer.weight)
    if not _there(layer):
        raise AdapterError(NEEDS_WEIGHTS)
    if form(weight) is None and weight.dim() == 2:
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return wide.t() if isinstance(layer, Conv1D) else wide
    eye = torch.eye(cast(int, layer.in_features), device=weight.device)
    bias = bias_of(layer)
    columns = [layer(part) - (0 if bias is None else bias) for part in eye.split(1024)]
    return torch.cat(columns).t().float()


def _moved_back(lora: LoRATensors, layer: nn.Module, adapter: PeftAdapter) -> LoRATensors:
    """A LoRA trained beside W - s B0 A0, as one beside W: [B, -B0] [A; A0]. B0 A0 is computed from W as PEFT does.

    PiSSA (arXiv 2404.02948): s B0 A0 is the best rank-r part of W. OLoRA (arXiv 2406.01775): B0 A0 are the first r
    columns of Q times rows of R, W = Q R.
    """
    weight, rank = dense_weight(layer), lora.A.shape[0]
    if adapter.moved == "pissa":
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        B0, A0 = U[:, :rank] * (S[:rank] / lora.scale), V[:rank]
    else:
        stored = isinstance(layer, Conv1D)  # PEFT takes the weight as it is stored, there W^T
        Q, R = torch.linalg.qr(weight.t() if stored else weight)
        B0, A0 = (R[:rank].t(), Q[:, :rank].t()) if stored else (Q[:, :rank], R[:rank])
    A, B = lora.A.to(A0), lora.B.to(B0)
    return replace(lora, A=torch.cat([A, A0]), B=torch.cat([B, -B0], 1))


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a base layer, if it has one."""
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _there(layer: nn.Module) -> bool:
    """Whether the weights of a layer can be read: neither on the meta device nor partitioned."""
    held = [getattr(layer, name, None) for name in ("weight", "bias")]
    return all(value.device.type != "meta" and value.numel() > 0 for value in held if isinstance(value, Tensor))


def _same(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and value.shape == other.shape and torch.equal(value, other.cpu().to(value.dtype))
