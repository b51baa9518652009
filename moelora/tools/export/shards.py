"""The files of a base model: which tensor of which safetensors file is which parameter, and changing some of them.

Names are mapped as transformers maps them when it loads the files; nothing is guessed. A changed file is a copy of the
old one with some ranges of bytes replaced: header, order, dtypes and all other bytes stay what they were.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moelora.core.errors import AdapterError
from moelora.core.validate import nearest
from moelora.io.files import read_object
from moelora.io.tensors import Entry, TensorFile
from moelora.model.layer import RoutedLinear
from moelora.model.saved import TrainedCopy

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe")
LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)", re.IGNORECASE)
NOT_COPIED = re.compile(r"adapter_config\.json|(?!model\.safetensors\.index\.json$).*\.index\.json|README.*")
WANTED = [f"*{end}" for end in (*TEXTS, ".safetensors")] + ["LICENSE*", "NOTICE*", "USE_POLICY*"]
MAX_INDEX = 64 << 20
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights that are not quantised."""


def base_folder(name: str, revision: str | None, weights: bool = True) -> Path:
    """The folder of a base model: a local one, or a snapshot from the hub (without ``weights``, its texts alone).

    Raises AdapterError.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = WANTED if weights else [pattern for pattern in WANTED if "safetensors" not in pattern]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(
            f"base model '{name}': no such folder, and not readable from the hub: {error}; give its place with --base"
        ) from error


class Shards:
    """The safetensors files of a base model and what their tensors are in ``model`` (adapted or not, even empty)."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder, self.files = folder, _shard_names(folder)
        self.opened = {name: _open(folder, name) for name in self.files}
        self.parameters = base_state(model)
        found: dict[str, list[tuple[str, str, bool]]] = {}
        rename = _renaming(model, self.parameters)
        for name, file in self.opened.items():
            for key in file.entries:
                parameter, converted = rename(key)
                found.setdefault(parameter, []).append((name, key, converted))
        self.found = found

    def place(self, parameter: str) -> tuple[str, str]:
        """(file, key) of a parameter, by its name in the base model.

        Raises AdapterError where it is in no file, in two places, or in a layout of its own.
        """
        places = self.found.get(parameter, [])
        if not places:
            tied = self._tied(parameter)
            why = f"it is tied to '{tied}'" if tied else f"the files have none{nearest(parameter, self.found)}"
            raise AdapterError(f"{self.folder}: no tensor for '{parameter}': {why}; merging needs a weight of its own")
        if len(places) > 1:
            said = " and ".join(f"{key} in {name}" for name, key, _ in places)
            raise AdapterError(f"{self.folder}: '{parameter}' is there twice: {said}; keep one of them")
        name, key, converted = places[0]
        if converted:
            raise AdapterError(
                f"{self.folder}: {key} becomes '{parameter}' by more than a new name when transformers loads it, so it "
                "cannot be changed in its file; in Python, moelora.tools.export.merge.merge(model) merges in memory"
            )
        return name, key

    def entry(self, parameter: str) -> Entry:
        """Dtype and shape of a parameter's tensor in its file."""
        name, key = self.place(parameter)
        return self.opened[name].entries[key]

    def read(self, parameter: str) -> Tensor:
        """A parameter's tensor, as in its file. Raises AdapterError where its shape is not the model's."""
        name, key = self._fitting(parameter)
        return self.opened[name].read(key)

    def mapped(self, parameter: str) -> Tensor:
        """``read`` without reading: the system fetches the pages that are looked at, and may drop them again."""
        name, key = self._fitting(parameter)
        with safe_open(self.folder / name, "pt") as file:
            value: Tensor = file.get_tensor(key)
        return value

    def refuse_tied(self, parameters: Iterable[str]) -> None:
        """Raise AdapterError where a parameter stands in other places of the model too, which would change with it."""
        for parameter in parameters:
            tied = self._tied(parameter)
            if tied:
                raise AdapterError(
                    f"'{parameter}' is tied to '{tied}', which would change with it; save the base model untied first, "
                    "or export with --to lora or --to peft"
                )

    def copy(self, into: Path, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Write all files again, some parameters changed: by a function from the old tensor to the new."""
        by_file: dict[str, list[tuple[str, str]]] = {}
        for parameter in changes:
            name, key = self.place(parameter)
            by_file.setdefault(name, []).append((parameter, key))
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and _is_text(path):
                shutil.copyfile(path, into / path.name)
        more = self.folder / "additional_chat_templates"
        if more.is_dir():
            shutil.copytree(more, into / more.name)
        for name, file in self.opened.items():
            shutil.copyfile(self.folder / name, into / name)
            with open(into / name, "rb+") as copied:
                for parameter, key in by_file.get(name, []):
                    entry = file.entries[key]
                    new = changes[parameter](self.read(parameter)).to(entry.dtype).contiguous()
                    copied.seek(file.start + entry.begin)
                    copied.write(new.reshape(-1).view(torch.uint8).numpy().tobytes())
                copied.flush()
                os.fsync(copied.fileno())

    def _fitting(self, parameter: str) -> tuple[str, str]:
        name, key = self.place(parameter)
        shape, expected = self.opened[name].entries[key].shape, tuple(self.parameters[parameter].shape)
        if shape != expected:
            raise AdapterError(
                f"{self.folder / name}: {key} is {shape}, the model's '{parameter}' {expected}; give the base model "
                "that the adapter was made for"
            )
        return name, key

    def _tied(self, parameter: str) -> str | None:
        own = self.parameters.get(parameter)
        others = (name for name, value in self.parameters.items() if value is own and name != parameter)
        return None if own is None else next(others, None)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """A base model's parameters and saved buffers by their names there, also where it is adapted now."""
    inside = {path: "base_layer." for path, m in model.named_modules() if isinstance(m, RoutedLinear)}
    inside |= {path: "original." for path, m in model.named_modules() if isinstance(m, TrainedCopy)}
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        parts = name.split(".")
        outer = next((path for n in range(len(parts)) if (path := ".".join(parts[:n])) in inside), None)
        if outer is None:
            found[name] = value
        elif name.startswith(f"{outer}.{inside[outer]}"):
            found[f"{outer}.{name.removeprefix(f'{outer}.{inside[outer]}')}"] = value
    return found


def _renaming(model: Any, parameters: Mapping[str, Tensor]) -> Callable[[str], tuple[str, bool]]:
    """From a key in a file to (parameter, whether its values are converted too), as transformers does it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    prefix, known = getattr(model, "base_model_prefix", None) or None, dict(parameters)

    def rename(key: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        return name, pattern is not None

    return rename


def _shard_names(folder: Path) -> list[str]:
    """The safetensors files that transformers would load."""
    if (folder / WHOLE).is_file():
        return [WHOLE]
    if not (folder / INDEX).is_file():
        raise AdapterError(
            f"{folder}: neither {WHOLE} nor {INDEX}; merging reads safetensors only: load the model with transformers "
            "and save it again with save_pretrained"
        )
    index = read_object(folder, INDEX, MAX_INDEX, _target(folder / INDEX))
    names = sorted(set(index.get("weight_map", {}).values()))
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange or not names:
        raise AdapterError(f"{folder / INDEX}: weight_map: found {strange or names}, expected files of this folder")
    return names


def _open(folder: Path, name: str) -> TensorFile:
    return TensorFile(folder, name, _target(folder / name))


def _target(path: Path) -> Path:
    """The folder that a link leads to: snapshots of the hub are links into its cache."""
    return path.resolve().parent


def _is_text(path: Path) -> bool:
    """Whether a file of the base goes along: configuration, tokenizer, templates, licence."""
    if NOT_COPIED.fullmatch(path.name):
        return False
    return path.suffix in TEXTS or LEGAL.match(path.name) is not None
