"""Adapter folders on disk: written file by file with the manifest last, read only when every hash agrees.

    moelora.json            manifest: format, configuration, base model, sites, experts, sha256 of every file
    experts/<name>/         one plain PEFT LoRA per expert, where the parameterisation is one
    router.safetensors      everything else
    README.md               model card

This module knows files and tensors, not models. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora.core.errors import AdapterError, OutputError
from moelora.core.validate import Strict

MANIFEST = "moelora.json"
FORMAT = 1


class BaseInfo(Strict):
    """The base model an adapter belongs to."""

    model: str
    revision: str | None = None
    cls: str
    fingerprint: str | None = None


class SiteInfo(Strict):
    """One adapted layer."""

    name: str
    in_features: int
    out_features: int


class Manifest(Strict):
    """The content of moelora.json."""

    format: int
    moelora: str
    base: BaseInfo
    adapter: dict[str, Any]
    sites: list[SiteInfo]
    experts: list[str]
    files: dict[str, str]


def write_folder(folder: Path, manifest: dict[str, Any], files: dict[str, dict[str, Tensor] | str]) -> None:
    """Write ``files`` (relative path to tensors or text) and then the manifest with their hashes.

    Each file appears under its name complete or not at all. Other files of the folder are left alone. Raises
    OutputError.
    """
    try:
        hashes = {name: _write(folder / name, content) for name, content in files.items()}
        text = json.dumps({**manifest, "format": FORMAT, "files": hashes}, indent=2) + "\n"
        _write(folder / MANIFEST, text)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: cannot write the adapter: {error.strerror or error}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an adapter folder. Raises AdapterError."""
    path = folder / MANIFEST
    if not path.is_file():
        peft = (folder / "adapter_config.json").is_file()
        found = "a PEFT adapter, not a moelora one" if peft else "no such file"
        raise AdapterError(f"{path}: {found}; expected a folder written by moelora.save or `moelora train`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise AdapterError(
                f"{path}: format {content.get('format')!r}; this version reads format {FORMAT}, update moelora"
            )
        return Manifest.model_validate(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: not JSON ({error}); the file is damaged, save the adapter again") from None
    except ValidationError as error:
        fault = error.errors()[0]
        raise AdapterError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def read_tensors(folder: Path, manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    """Tensors of every safetensors file in the manifest, by file. Raises AdapterError for any change since saving."""
    found = {}
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
            raise AdapterError(f"{folder / MANIFEST}: files: '{name}' leaves the folder")
        if not path.is_file():
            raise AdapterError(f"{path}: missing, though {MANIFEST} lists it; copy the whole folder")
        if not name.endswith(".safetensors"):
            continue
        actual = _sha256(path)
        if actual != expected:
            raise AdapterError(f"{path}: sha256 {actual[:12]}..., expected {expected[:12]}...; the file was changed")
        try:
            found[name] = load_file(path)
        except SafetensorError as error:
            raise AdapterError(f"{path}: not a safetensors file ({error})") from None
        bad = next((key for key, value in found[name].items() if not torch.isfinite(value).all()), None)
        if bad is not None:
            raise AdapterError(f"{path}: {bad} holds NaN or infinite values; the training run that wrote it diverged")
    return found


def read_json(folder: Path, manifest: Manifest, name: str) -> Any:
    """The content of a JSON file in the manifest. Raises AdapterError for any change since saving."""
    path = folder / name
    if not path.is_file():
        raise AdapterError(f"{path}: missing, though {MANIFEST} lists it; copy the whole folder")
    actual, expected = _sha256(path), manifest.files.get(name, "")
    if actual != expected:
        raise AdapterError(f"{path}: sha256 {actual[:12]}..., expected {expected[:12]}...; the file was changed")
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Tensor] | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if isinstance(content, str):
        partial.write_text(content, encoding="utf-8")
    else:
        save_file({key: value.contiguous() for key, value in content.items()}, partial, metadata={"format": "pt"})
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    digest = _sha256(partial)
    os.replace(partial, path)
    return digest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
