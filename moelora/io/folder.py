"""Adapter folders on disk: written file by file with the manifest last, read only when every hash agrees.

    moelora.json            manifest: format, configuration, base model, sites, experts, sha256 of every file
    experts/<name>/         one plain PEFT LoRA per expert, where the parameterisation is one
    router.safetensors      everything else
    README.md               model card

This module knows files and tensors, not models. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

from pydantic import FailFast, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moelora.core.errors import AdapterError, OutputError
from moelora.core.validate import Strict
from moelora.io.files import open_inside, read_object, sha256_of, short
from moelora.io.tensors import TensorFile

MANIFEST = "moelora.json"
FORMAT = 1
MAX_MANIFEST, MAX_VALUES, MAX_EXPERTS = 8 << 20, 200_000, 4096
PART = "[A-Za-z0-9_.-]{1,200}"
PIN = re.compile(rf"{PART}/{PART}(/{PART})*@[0-9a-f]{{40}}")


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


class Pin(Strict):
    """An expert that is on the hub and not in the folder: ``org/name[/subfolder]@commit``, and its files' sha256."""

    adapter: str
    files: dict[str, str]


class Manifest(Strict):
    """The content of moelora.json. experts: in order, which is the routers'; those with a pin have no files here."""

    format: int
    moelora: str
    base: BaseInfo
    adapter: dict[str, Any]
    sites: Annotated[list[SiteInfo], FailFast()]
    experts: list[str]
    pins: dict[str, Pin] = {}
    files: dict[str, str]


def write_folder(folder: Path, manifest: dict[str, Any], files: dict[str, dict[str, Tensor] | str]) -> None:
    """Write ``files`` (relative path to tensors or text) and then the manifest with their hashes.

    Each file appears under its name complete or not at all. Other files of the folder are left alone. Raises
    OutputError.
    """
    try:
        hashes = {name: write_file(folder / name, content) for name, content in files.items()}
        text = json.dumps({**manifest, "format": FORMAT, "files": hashes}, indent=2) + "\n"
        write_file(folder / MANIFEST, text)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: cannot write the adapter: {error.strerror or error}") from error


def read_manifest(folder: Path, root: Path | None = None) -> Manifest:
    """The manifest of an adapter folder. root: where links may lead, if not only into the folder. Raises AdapterError.

    Its names of files and experts are plain relative paths, none of them twice. Pins are of the hub, at whole commits.
    """
    path = folder / MANIFEST
    if not os.path.isfile(path):
        peft = os.path.isfile(folder / "adapter_config.json")
        found = "a PEFT adapter, not a moelora one" if peft else "no such file"
        raise AdapterError(f"{path}: {found}; expected a folder written by moelora.save or `moelora train`")
    try:
        content = read_object(folder, MANIFEST, MAX_MANIFEST, root)
    except AdapterError as error:
        raise AdapterError(str(error).replace(f"{path}: JSON: found", f"{path}: not JSON:", 1)) from None
    if content.get("format") != FORMAT:
        found = short(content.get("format"))
        raise AdapterError(f"{path}: format {found}; this version reads format {FORMAT}, update moelora")
    _check_count(path, content)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ascii(".".join(map(str, fault["loc"])))[1:-1]
        raise AdapterError(f"{path}: {place[:200]}: {fault['msg']}") from None
    _check_names(path, "files", manifest.files, rf"{PART}(/{PART})*")
    _check_names(path, "experts", manifest.experts, PART)
    experts = set(manifest.experts)
    for name, pin in manifest.pins.items():
        if name not in experts:
            raise AdapterError(f"{path}: pins: {short(name)} is not in experts")
        if PIN.fullmatch(pin.adapter) is None or {".", ".."} & set(pin.adapter.partition("@")[0].split("/")):
            raise AdapterError(f"{path}: pins: {short(pin.adapter)}; expected org/name@commit, of 40 digits")
    return manifest


def read_tensors(folder: Path, manifest: Manifest, root: Path | None = None) -> dict[str, dict[str, Tensor]]:
    """Tensors of every safetensors file in the manifest, by file. Raises AdapterError for any change since saving.

    The header of a file is checked first, then its hash, and only then its tensors are read.
    """
    found = {}
    for name in manifest.files:
        _check_listed(folder, name, root)
        if name.endswith(".safetensors"):
            found[name] = _read_file(folder, name, manifest, root)
    return found


def read_json(folder: Path, manifest: Manifest, name: str, root: Path | None = None) -> dict[str, Any]:
    """The content of a JSON file in the manifest. Raises AdapterError for any change since saving."""
    _check_listed(folder, name, root)
    content = read_object(folder, name, root=root)
    _check_hash(folder, name, manifest, root)
    return content


def _check_count(path: Path, content: dict[str, Any]) -> None:
    """Raise AdapterError for more values than a mixture has: finding fault with each of millions would take minutes."""
    left, stack = MAX_VALUES, [content]
    while stack:
        value: Any = stack.pop()
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left -= len(inside)
        if left < 0:
            raise AdapterError(f"{path}: more than {MAX_VALUES} values; the file is damaged, save the adapter again")
        stack.extend(inside)
    for key in ("experts", "pins"):
        if isinstance(content.get(key), list | dict) and len(content[key]) > MAX_EXPERTS:
            raise AdapterError(f"{path}: {key}: {len(content[key])} of them, expected at most {MAX_EXPERTS}")


def _check_names(path: Path, key: str, names: Iterable[str], rule: str) -> None:
    """Raise AdapterError unless every name is of plain parts, and there once."""
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts:
            raise AdapterError(f"{path}: {key}: {short(name)} leaves the folder")
        if re.fullmatch(rule, name) is None or "." in parts:
            raise AdapterError(f"{path}: {key}: {short(name)}; expected letters, digits, '_', '.' and '-'")
        if name in seen:
            raise AdapterError(f"{path}: {key}: {short(name)} twice; expected every name once")
        seen.add(name)


def _check_listed(folder: Path, name: str, root: Path | None) -> None:
    if not os.path.isfile(folder / name):
        raise AdapterError(f"{folder / name}: missing, though {MANIFEST} lists it; copy the whole folder")
    open_inside(folder, name, root).close()


def _check_hash(folder: Path, name: str, manifest: Manifest, root: Path | None) -> None:
    actual, expected = sha256_of(folder, name, root), manifest.files.get(name, "")
    if actual != expected:
        raise AdapterError(
            f"{folder / name}: sha256 {actual[:12]}..., expected {short(expected[:12])[1:-1]}...; the file was changed"
        )


def _read_file(folder: Path, name: str, manifest: Manifest, root: Path | None) -> dict[str, Tensor]:
    path = folder / name
    try:
        file = TensorFile(folder, name, root)
    except AdapterError as error:
        cause = str(error).removeprefix(f"{path}: ")
        raise AdapterError(f"{path}: not a safetensors file, or the file was changed ({cause})") from None
    with closing(file):
        _check_hash(folder, name, manifest, root)
        try:
            return {key: file.read(key) for key in file.entries}
        except AdapterError as error:
            raise AdapterError(str(error).replace(": found NaN", " holds NaN", 1)) from None


def write_file(path: Path, content: dict[str, Tensor] | str) -> str:
    """Write tensors or text so that the file is there whole or not at all; gives its sha256. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")  # a folder, since safetensors puts a file of its own beside it
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        file = partial / path.name
        if isinstance(content, str):
            file.write_text(content, encoding="utf-8")
        else:
            tensors = {key: value.contiguous() for key, value in content.items()}
            try:
                save_file(tensors, file, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, among others
                raise OSError(str(error)) from error
            file.chmod(partial.stat().st_mode & 0o666)  # for all whom the umask allows, as text; it made 0600
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
        digest = sha256_of(partial, path.name, limit=None)
        os.replace(file, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest
