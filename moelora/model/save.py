"""save and load: an adapted model to a folder and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from moelora.core.errors import AdapterError
from moelora.core.methods import Methods
from moelora.io.folder import MANIFEST, Manifest, read_manifest
from moelora.model.adapt import attach, fingerprint, print_table
from moelora.model.adapters import ROUTER_FILE, merged_tensors
from moelora.model.config import AdapterConfig, build_sites, find_sites, resolve
from moelora.model.record import adaptation, main_process
from moelora.model.saved import find_saved
from moelora.model.write import adapter_tensors, refuse_foreign, write

Base = TypeVar("Base", bound=nn.Module)


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter of ``model`` to ``folder``: experts, router, configuration, base fingerprint, model card.

    Raises OutputError when the folder holds files that are not an adapter's, and writes nothing then.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    write(model, folder)


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
    tensors = merged_tensors(folder, manifest, config)
    _check_base(base_model, manifest, config, folder, force)
    _check_shapes(base_model, config, methods, tensors, folder)
    attach(base_model, config, methods, initialise=False)
    fill(base_model, tensors)
    if verbose and main_process():
        print_table(base_model)
    return base_model


def restore(model: nn.Module, folder: str | Path) -> None:
    """Read a saved adapter's tensors into a model that is adapted in the same way already (resuming a run)."""
    record, path = adaptation(model), Path(folder)
    manifest = read_manifest(path)
    if manifest.adapter != record.config.model_dump():
        changed = [k for k, v in record.config.model_dump().items() if manifest.adapter.get(k) != v]
        raise AdapterError(f"{path}: saved with another adapter configuration (differs in {', '.join(changed)})")
    tensors = merged_tensors(path, manifest, record.config)
    _match({name: value.shape for name, value in adapter_tensors(model).items()}, tensors, path)
    fill(model, tensors)


@torch.no_grad()
def fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy adapter tensors into the layers of an adapted model."""
    for name, value in adapter_tensors(model).items():
        value.copy_(tensors[name])


def _check_base(model: nn.Module, manifest: Manifest, config: AdapterConfig, folder: Path, force: bool) -> None:
    sites = find_sites(model, config)
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
    sites = find_sites(model, config)
    expected: dict[str, torch.Size] = {}
    seen: dict[int, Tensor] = {}  # kept alive, so that no id is given twice
    with torch.device("meta"):
        for site, router, experts in build_sites(config, methods, sites):
            for part, module in (("router", router), ("experts", experts)):
                for key, value in module.state_dict(keep_vars=True).items():
                    if id(value) not in seen:
                        seen[id(value)] = value
                        expected[f"{site.name}.{part}.{key}"] = value.shape
    for path in find_saved(model, config.modules_to_save):
        expected.update({f"{path}.trained.{k}": v.shape for k, v in model.get_submodule(path).state_dict().items()})
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
