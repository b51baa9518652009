"""save and load: an adapted model to a folder and back, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from moelora.core.errors import AdapterError
from moelora.core.methods import Methods
from moelora.io.folder import MANIFEST, Manifest, read_manifest
from moelora.io.hub import Located, locate
from moelora.io.tensors import TensorFile
from moelora.model.adapt import attach, fingerprint, print_table
from moelora.model.adapters import fill_experts, is_lora
from moelora.model.config import AdapterConfig, build_sites, resolve
from moelora.model.layer import RoutedLinear
from moelora.model.quantised import form_of
from moelora.model.record import adaptation, main_process, routed_layers
from moelora.model.saved import fill_saved, find_saved, saved_modules
from moelora.model.sites import find_sites
from moelora.model.sources import Source, check_hash, open_saved
from moelora.model.write import ROUTER_FILE, layer_tensors, refuse_foreign, write

Base = TypeVar("Base", bound=nn.Module)


def save(model: nn.Module, folder: str | Path, *, experts: Literal["copied", "pinned"] = "copied") -> None:
    """Write the adapter of ``model`` to ``folder``: experts, router, configuration, base fingerprint, model card.

    experts: ``copied`` is self-contained. ``pinned`` writes hub id, commit and sha256 in place of every expert, and
    needs experts that are frozen and all from the hub. Called by all processes of a run; the first one writes. Raises
    OutputError when that is not so, or when the folder holds files that are not an adapter's, and writes nothing then.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    write(model, folder, pinned=experts == "pinned")


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
    the adapter's (``force`` skips the comparison of weights); warns when one of them is quantised, and the other not.

        model = moelora.load(AutoModelForCausalLM.from_pretrained(base), "out/run")
    """
    here = revision is None or Path(adapter).exists()
    at = locate(adapter if here else f"{adapter}@{revision}")
    methods = Methods(plugins)
    saved = _open(at, methods)
    _check_base(base_model, saved, methods, force)
    expected, own_folders = _expected(base_model, saved.config, methods)
    _check_experts(saved, own_folders)
    _check_shapes(expected, saved)
    tensors = saved.read()

    def start(layers: dict[str, RoutedLinear]) -> None:
        _fill(base_model, layers, saved, tensors)

    record = attach(base_model, saved.config, methods, start)
    record.pins = [source.pin for source in saved.sources]
    fill_saved(base_model, tensors)
    if verbose and main_process():
        print_table(base_model)
    return base_model


def restore(model: nn.Module, folder: str | Path) -> None:
    """Read a saved adapter's tensors into a model that is adapted in the same way already (resuming a run)."""
    record = adaptation(model)
    saved = _open(Located(Path(folder), None, None), record.methods)
    if saved.manifest.adapter != record.config.model_dump():
        changed = [k for k, v in record.config.model_dump().items() if saved.manifest.adapter.get(k) != v]
        raise AdapterError(f"{folder}: saved with another adapter configuration (differs in {', '.join(changed)})")
    layers = {layer.site.name: layer for layer in routed_layers(model)}
    expected = {name: value.shape for name, value in layer_tensors(layers).items()}
    for path, module in saved_modules(model).items():
        expected.update({f"{path}.trained.{key}": value.shape for key, value in module.state_dict().items()})
    _check_experts(saved, any(is_lora(layer.experts) for layer in layers.values()))
    _check_shapes(expected, saved)
    tensors = saved.read()
    _fill(model, layers, saved, tensors)
    fill_saved(model, tensors)


@dataclass(frozen=True)
class _Saved:
    """A folder that moelora wrote: its headers are read and its hashes agree."""

    folder: Path
    manifest: Manifest
    config: AdapterConfig
    router: TensorFile
    sources: list[Source]

    def read(self) -> dict[str, Tensor]:
        """All tensors but those of experts with a folder of their own."""
        found = {name: self.router.read(name) for name in self.router.entries}
        self.router.close()
        return found


def _open(at: Located, methods: Methods) -> _Saved:
    manifest = read_manifest(at.folder, at.root)
    config = resolve(manifest.adapter, methods)
    check_hash(at.folder, ROUTER_FILE, manifest.files, at.root)
    return _Saved(at.folder, manifest, config, TensorFile(at.folder, ROUTER_FILE, at.root), open_saved(at, manifest))


@torch.no_grad()
def _fill(model: nn.Module, layers: dict[str, RoutedLinear], saved: _Saved, tensors: Mapping[str, Tensor]) -> None:
    for name, value in layer_tensors(layers).items():
        value.copy_(tensors[name])
    if saved.sources:
        fill_experts(model, layers, saved.sources, saved.config)


def _check_base(model: nn.Module, saved: _Saved, methods: Methods, force: bool) -> None:
    sites, manifest, folder = find_sites(model, saved.config, methods), saved.manifest, saved.folder
    here = [(site.name, site.in_features, site.out_features) for site in sites]
    there = [(site.name, site.in_features, site.out_features) for site in manifest.sites]
    if here != there:
        extra, absent = [s for s in here if s not in there], [s for s in there if s not in here]
        raise AdapterError(
            f"{folder}: made for {manifest.base.cls} '{manifest.base.model}' with {len(there)} adapted layers; in this "
            f"{type(model).__name__} they differ: not here {absent[:2]}, only here {extra[:2]}"
        )
    own, made_for = fingerprint(model, [site.name for site in sites]), manifest.base.fingerprint
    if force or own is None or made_for is None or own == made_for:
        return
    if form_of(own) == form_of(made_for):
        raise AdapterError(
            f"{folder}: made for the weights of '{manifest.base.model}' (fingerprint {made_for}), and "
            f"this model has others ({own}); load the right base model, or pass force=True (--force)"
        )
    if main_process():
        warnings.warn(
            f"{folder}: made beside '{manifest.base.model}' with {form_of(made_for)} weights, and this model's are "
            f"{form_of(own)}: the experts add the same, the base differs by the rounding (whether it is the same base "
            "model was not compared)",
            stacklevel=3,
        )


def _expected(model: nn.Module, config: AdapterConfig, methods: Methods) -> tuple[dict[str, torch.Size], bool]:
    """(shapes by name of what router.safetensors holds for this model, whether experts have folders of their own)."""
    found: dict[str, torch.Size] = {}
    own_folders = False
    seen: dict[int, Tensor] = {}  # kept alive, so that no id is given twice
    with torch.device("meta"):
        built = list(build_sites(config, methods, find_sites(model, config, methods)))  # shared by the end
        for site, router, experts in built:
            for part, module in (("router", router), ("experts", experts)):
                for key, value in module.state_dict(keep_vars=True).items():
                    apart = module is experts and is_lora(experts) and key in ("lora_A", "lora_B")
                    own_folders = own_folders or apart
                    if id(value) not in seen and not apart:
                        seen[id(value)] = value
                        found[f"{site.name}.{part}.{key}"] = value.shape
    for path in find_saved(model, config.modules_to_save):
        found.update({f"{path}.trained.{k}": v.shape for k, v in model.get_submodule(path).state_dict().items()})
    return found, own_folders


def _check_experts(saved: _Saved, own_folders: bool) -> None:
    """Raise AdapterError unless the experts are as many as the configuration says, each with its folder or none."""
    manifest, most = saved.manifest, saved.config.experts.most
    if len(manifest.experts) != most or len(set(manifest.experts)) != most:
        raise AdapterError(
            f"{saved.folder}: {len(set(manifest.experts))} experts in {MANIFEST}, {most} by its configuration"
        )
    if len(saved.sources) != (most if own_folders else 0):
        names = {source.folder.name for source in saved.sources}
        lacks = next((name for name in manifest.experts if name not in names and name not in manifest.pins), None)
        found = f"no files of experts/{lacks}" if own_folders else f"files of experts/{manifest.experts[0]}"
        raise AdapterError(f"{saved.folder}: {found} in {MANIFEST}; copy the whole folder, or save the adapter again")


def _check_shapes(expected: Mapping[str, torch.Size], saved: _Saved) -> None:
    entries, path = saved.router.entries, saved.router.path
    for key in sorted(expected.keys() ^ entries.keys()):
        problem = "missing" if key in expected else "not part of this adapter"
        raise AdapterError(f"{path}: tensor {key} is {problem}")
    for key, shape in expected.items():
        if entries[key].shape != tuple(shape):
            raise AdapterError(f"{path}: tensor {key} is {entries[key].shape}, expected {tuple(shape)}")
