"""Adapter folders: what is written, and every way in which a damaged one is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora.core.errors import AdapterError, OutputError
from moelora.io.folder import FORMAT, MANIFEST, Manifest, read_manifest, read_tensors, write_folder

HEAD: dict[str, Any] = {
    "moelora": "0",
    "base": {"model": "m", "revision": None, "cls": "C", "fingerprint": None},
    "adapter": {"router": {"name": "single"}, "rate": 1e-5},
    "sites": [{"name": "lin", "in_features": 5, "out_features": 7}],
    "experts": ["expert_0"],
}
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "out" / "adapter"
    write_folder(path, HEAD, {"README.md": "hello\n", "router.safetensors": TENSORS, "experts/e/x.safetensors": {}})
    return path


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of the manifest."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed file, so that a later check has to notice."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit(folder, files={**files, name: hashlib.sha256((folder / name).read_bytes()).hexdigest()})


def fault(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_tensors(folder, read_manifest(folder))
    return str(caught.value)


def test_round_trip(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest) and manifest.format == FORMAT
    assert manifest.model_dump() == {**HEAD, "format": FORMAT, "files": manifest.files}
    found = read_tensors(folder, manifest)
    assert found.keys() == {"router.safetensors", "experts/e/x.safetensors"}
    assert found["experts/e/x.safetensors"] == {}
    for name, tensor in TENSORS.items():
        read = found["router.safetensors"][name]
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_hashes_are_those_of_the_files(folder: Path) -> None:
    files = read_manifest(folder).files
    assert files.keys() == {"README.md", "router.safetensors", "experts/e/x.safetensors"}
    for name, expected in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected


def test_hashes_of_files_of_several_megabytes(tmp_path: Path) -> None:
    write_folder(tmp_path, HEAD, {"big.safetensors": {"x": torch.rand(600_000)}})
    name, expected = next(iter(read_manifest(tmp_path).files.items()))
    assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == expected
    assert read_tensors(tmp_path, read_manifest(tmp_path))[name]["x"].shape == (600_000,)


def test_files_are_plain_safetensors(folder: Path) -> None:
    assert torch.equal(load_file(folder / "router.safetensors")["a"], TENSORS["a"])


def test_views_and_shared_storage_are_written_out(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    write_folder(tmp_path, HEAD, {"x.safetensors": {"left": whole[:, :2], "turned": whole.t()}})
    found = read_tensors(tmp_path, read_manifest(tmp_path))["x.safetensors"]
    assert torch.equal(found["left"], whole[:, :2]) and torch.equal(found["turned"], whole.t())


def test_nothing_partial_stays_behind(folder: Path) -> None:
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "README.md",
        "experts/e/x.safetensors",
        MANIFEST,
        "router.safetensors",
    ]


def test_writing_again_replaces_and_leaves_other_files_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    write_folder(folder, HEAD, {"router.safetensors": {"a": torch.zeros(1)}})
    assert (folder / "notes.txt").read_text() == "mine"
    assert torch.equal(read_tensors(folder, read_manifest(folder))["router.safetensors"]["a"], torch.zeros(1))


def test_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b))[1])
    write_folder(tmp_path, HEAD, {"b.safetensors": TENSORS, "a.md": "x"})
    assert sorted(order[:-1]) == ["a.md", "b.safetensors"] and order[-1] == MANIFEST


def test_an_interrupted_write_leaves_no_new_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / MANIFEST).read_text()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(folder / "router.safetensors"))

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OutputError, match=r"router\.safetensors: cannot write the adapter: No space left on device"):
        write_folder(folder, {**HEAD, "moelora": "1"}, {"router.safetensors": {"a": torch.zeros(1)}})
    assert (folder / MANIFEST).read_text() == before
    assert torch.equal(read_tensors(folder, read_manifest(folder))["router.safetensors"]["a"], TENSORS["a"])


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot write the adapter"):
        write_folder(tmp_path / "taken", HEAD, {"a.md": "x"})


# Reading what somebody broke


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such file; expected a folder written by moelora.save" in fault(tmp_path / "absent")


def test_a_peft_folder_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "a PEFT adapter, not a moelora one" in fault(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_a_manifest_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert "not JSON" in fault(folder) and "save the adapter again" in fault(folder)


def test_a_newer_format(folder: Path) -> None:
    edit(folder, format=FORMAT + 1)
    assert f"format {FORMAT + 1}; this version reads format {FORMAT}, update moelora" in fault(folder)


@pytest.mark.parametrize(
    ("changes", "place"),
    [({"sites": "lin"}, "sites"), ({"files": {"a": 1}}, "files.a"), ({"extra": 1}, "extra"), ({"base": {}}, "base")],
)
def test_a_manifest_of_another_shape(folder: Path, changes: dict[str, Any], place: str) -> None:
    edit(folder, **changes)
    assert f"{MANIFEST}: {place}" in fault(folder)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"x"'])
def test_a_manifest_that_is_no_object(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    assert MANIFEST in fault(folder)


def test_a_changed_file(folder: Path) -> None:
    path = folder / "router.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = fault(folder)
    assert "router.safetensors: sha256" in message and "the file was changed" in message


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "the file was changed" in fault(folder)
    rehash(folder, "router.safetensors")
    assert "not a safetensors file" in fault(folder)


def test_a_pickle_in_disguise(folder: Path) -> None:
    torch.save(TENSORS, folder / "router.safetensors")
    rehash(folder, "router.safetensors")
    assert "not a safetensors file" in fault(folder)


@pytest.mark.parametrize("name", ["router.safetensors", "README.md"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name}: missing, though {MANIFEST} lists it; copy the whole folder" in fault(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite(folder: Path, value: float) -> None:
    tensors: dict[str, Tensor] = {**TENSORS, "a": TENSORS["a"].clone()}
    tensors["a"][1, 2] = value
    save_file(tensors, folder / "router.safetensors")
    rehash(folder, "router.safetensors")
    assert "router.safetensors: a holds NaN or infinite values" in fault(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "experts/../../secret.safetensors"])
def test_a_path_that_leaves_the_folder(folder: Path, name: str) -> None:
    save_file(TENSORS, folder.parent / "secret.safetensors")
    edit(folder, files={name: hashlib.sha256((folder.parent / "secret.safetensors").read_bytes()).hexdigest()})
    assert f"files: '{name}' leaves the folder" in fault(folder)


def test_an_absolute_path(folder: Path) -> None:
    outside = folder.parent / "secret.safetensors"
    save_file(TENSORS, outside)
    edit(folder, files={str(outside): hashlib.sha256(outside.read_bytes()).hexdigest()})
    assert "leaves the folder" in fault(folder)


def test_a_link_that_leaves_the_folder(folder: Path) -> None:
    outside = folder.parent / "secret.safetensors"
    save_file(TENSORS, outside)
    (folder / "link.safetensors").symlink_to(outside)
    edit(folder, files={"link.safetensors": hashlib.sha256(outside.read_bytes()).hexdigest()})
    assert "leaves the folder" in fault(folder)
