"""A model for work on its experts alone: only the layers they stand on have weights, mapped from the files, not read.

What is left of a base model of 140 GB are its modules' names and shapes, and pages that the system may drop again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from moelora.core.errors import AdapterError
from moelora.core.methods import Methods
from moelora.io.folder import Manifest, read_manifest
from moelora.model.config import resolve
from moelora.model.saved import find_saved
from moelora.tools.export.shards import PLAIN, Shards


def hollow_base(folder: Path, base: Path, name: str, plugins: Iterable[str | Path] = ()) -> PreTrainedModel:
    """A base model without weights, but for the layers and modules_to_save of the adapter in ``folder``.

    base: the base model's folder. name: what it is called. ``moelora.load`` puts the adapter in and checks what it
    always does; a forward of the whole model is not possible. Raises AdapterError for a base without such layers, or
    without safetensors of the model's own layout.
    """
    manifest = read_manifest(folder)
    model = empty_model(manifest, base)
    model.config._name_or_path = name
    shards, sites = Shards(base, model), {site.name for site in manifest.sites}
    for parameter in _needed(model, manifest, plugins):
        if parameter not in shards.found and parameter.rpartition(".")[0] not in sites:
            value = torch.zeros_like(shards.parameters[parameter], device="cpu")  # a new classifier, say: it is trained
        else:
            value = shards.mapped(parameter)
        if parameter.endswith(".weight") and value.dtype not in PLAIN:
            raise AdapterError(f"{base}: '{parameter}' is quantised ({value.dtype})")
        _put(model, parameter, value)
    return model


def empty_model(manifest: Manifest, base: Path) -> PreTrainedModel:
    """The class of model that an adapter was saved with, on the meta device. Raises AdapterError."""
    cls: Any = getattr(transformers, manifest.base.cls, None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise AdapterError(
            f"the adapter is for a {manifest.base.cls}, which transformers {transformers.__version__} lacks"
        )
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{base}: no base model: {str(error).strip().splitlines()[0]}") from error
    with torch.device("meta"):
        model: PreTrainedModel = cls(config)
    return model


def _needed(model: nn.Module, manifest: Manifest, plugins: Iterable[str | Path]) -> list[str]:
    """Names of the base model's tensors under the adapter."""
    config = resolve(manifest.adapter, Methods(plugins))
    modules = dict(model.named_modules())
    found = []
    for path in [*(site.name for site in manifest.sites), *find_saved(model, config.modules_to_save)]:
        if path not in modules:
            raise AdapterError(f"the adapter is for a layer '{path}', which this {type(model).__name__} lacks")
        found += [f"{path}.{key}" for key in modules[path].state_dict()]
    return found


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, key, value)
