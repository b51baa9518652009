"""Adapter folders: what is written, and every way in which a damaged one is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora.core.errors import AdapterError, OutputError
from moelora.io import folder as writing
from moelora.io.folder import (
    FORMAT,
    MANIFEST,
    MAX_EXPERTS,
    MAX_MANIFEST,
    Manifest,
    read_json,
    read_manifest,
    read_tensors,
    write_folder,
)

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
    assert manifest.model_dump() == {**HEAD, "format": FORMAT, "pins": {}, "files": manifest.files}
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
    assert not list(folder.rglob(".*")), "nothing half-written is left"


def test_what_a_killed_writer_left_goes_with_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(tensors: Any, path: Path, **_: Any) -> None:
        path.with_name(".tmpZq3xYw").write_text("safetensors' own name for a file that is being written")
        killed()

    for place, name, call in ((writing, "save_file", half), (os, "replace", killed), (shutil, "rmtree", killed)):
        child = os.fork()
        if child == 0:
            try:
                monkeypatch.setattr(place, name, call)
                write_folder(folder, HEAD, {"router.safetensors": TENSORS})
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert [path.name for path in folder.glob(".*")] == [".router.safetensors.partial"]
    write_folder(folder, HEAD, {"router.safetensors": TENSORS})
    assert not list(folder.rglob(".*"))


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


@pytest.mark.parametrize(
    "name", ["a b.safetensors", "a\\b", "C:x", "./a", "a/./b", "a//b", "a/", "", "a\n", "\x1b[2J", "\u00e9", "x" * 999]
)
def test_names_of_files_are_plain(folder: Path, name: str) -> None:
    edit(folder, files={name: "0"})
    message = fault(folder)
    assert f"{MANIFEST}: files: " in message and message.isprintable() and len(message) < 500


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../a", "/a", "a b", ""])
def test_names_of_experts_are_plain(folder: Path, name: str) -> None:
    edit(folder, experts=["e", name])
    assert f"{MANIFEST}: experts: '{name}'" in fault(folder)


def test_an_expert_twice(folder: Path) -> None:
    edit(folder, experts=["a", "b", "a"])
    assert f"{MANIFEST}: experts: 'a' twice" in fault(folder)


@pytest.mark.parametrize("key", ['"format"', '"adapter"'])
def test_a_key_twice(folder: Path, key: str) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace(key, f"{key}: 1, {key}", 1))
    assert "the key twice" in fault(folder)


COMMIT = "0123456789" * 4


def pin_of(adapter: str, name: str = "expert_0") -> dict[str, Any]:
    return {name: {"adapter": adapter, "files": {}}}


@pytest.mark.parametrize("adapter", [f"org/name@{COMMIT}", f"org/name/sub/folder@{COMMIT}"])
def test_pins(folder: Path, adapter: str) -> None:
    edit(folder, pins=pin_of(adapter))
    assert read_manifest(folder).pins["expert_0"].adapter == adapter


@pytest.mark.parametrize(
    "adapter",
    [
        *("org/name", "org/name@main", f"org/name@{COMMIT}0", f"name@{COMMIT}", f"/org/name@{COMMIT}", "out/run"),
        *(f"../name@{COMMIT}", f"org/../name@{COMMIT}", f"./name@{COMMIT}", f"org/name@{COMMIT}/..", f"~/x@{COMMIT}"),
    ],
)
def test_pins_are_of_the_hub_at_whole_commits(folder: Path, adapter: str) -> None:
    # A folder from anywhere must not make the reader open what else is on this machine, or what may change.
    edit(folder, pins=pin_of(adapter))
    assert f"{MANIFEST}: pins: '{adapter}'" in fault(folder)


def test_a_pin_of_no_expert(folder: Path) -> None:
    edit(folder, pins=pin_of(f"org/name@{COMMIT}", "other"))
    assert f"{MANIFEST}: pins: 'other' is not in experts" in fault(folder)


def test_a_manifest_over_the_cap(folder: Path) -> None:
    os.truncate(folder / MANIFEST, MAX_MANIFEST + 1)
    assert f"{MANIFEST}: size" in fault(folder)


@pytest.mark.parametrize("changes", [{"format": "x" * 100_000}, {"files": {"x" * 100_000: 1}}, {"x" * 100_000: 1}])
def test_errors_about_a_large_manifest_are_short(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    assert len(fault(folder)) < 600


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": [0] * 250_000},
        {"files": {str(i): 0 for i in range(250_000)}},
        {"adapter": {"x": [[0] * 1000] * 250}},
        {"experts": [str(i) for i in range(MAX_EXPERTS + 1)]},
        {"pins": {str(i): {} for i in range(MAX_EXPERTS + 1)}},
    ],
)
def test_a_manifest_of_too_many_values(folder: Path, changes: dict[str, Any]) -> None:
    # Finding fault with each of them would take minutes and gigabytes.
    edit(folder, **changes)
    assert "more than 200000 values" in fault(folder) or f"of them, expected at most {MAX_EXPERTS}" in fault(folder)


def test_a_manifest_of_the_largest_models(folder: Path) -> None:
    site = {"name": "model.layers.0.mlp.experts.0.down_proj", "in_features": 2048, "out_features": 7168}
    edit(folder, sites=[site] * 46_000)
    assert len(read_manifest(folder).sites) == 46_000


def test_one_fault_is_enough(folder: Path) -> None:
    edit(folder, sites=[{}] * 150_000)
    with pytest.raises(ValidationError) as caught:
        Manifest.model_validate(json.loads((folder / MANIFEST).read_text()))
    assert caught.value.error_count() == 3  # those of the first site


@pytest.mark.parametrize("name", [MANIFEST, "README.md", "router.safetensors"])
def test_links_lead_anywhere_inside_root_and_no_further(folder: Path, name: str) -> None:
    # What the hub's cache looks like: every file of the folder is a link into another folder.
    (folder / name).rename(folder.parent / "blob")
    (folder / name).symlink_to(Path("..") / "blob")
    assert "leaves the folder" in fault(folder)
    manifest = read_manifest(folder, folder.parent)
    assert torch.equal(read_tensors(folder, manifest, folder.parent)["router.safetensors"]["a"], TENSORS["a"])
    with pytest.raises(AdapterError, match="leaves the folder"):
        read_tensors(folder, read_manifest(folder, folder), folder)


@pytest.mark.parametrize("name", ["router.safetensors", "README.md", MANIFEST])
def test_a_pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert fault(folder)  # and does not wait for somebody to write


def test_a_header_is_checked_before_the_hash(folder: Path) -> None:
    # A terabyte of zeros costs nothing on disk, and must not be hashed.
    os.truncate(folder / "router.safetensors", 1 << 40)
    message = fault(folder)
    assert "not a safetensors file" in message and "size: found 1099511627776 bytes" in message


def test_read_json(folder: Path) -> None:
    write_folder(folder, HEAD, {"experts/e/c.json": '{"r": 4}'})
    manifest = read_manifest(folder)
    assert read_json(folder, manifest, "experts/e/c.json") == {"r": 4}
    (folder / "experts/e/c.json").write_text('{"r": 5}')
    with pytest.raises(AdapterError, match="the file was changed"):
        read_json(folder, manifest, "experts/e/c.json")
    with pytest.raises(AdapterError, match="missing, though"):
        read_json(folder, manifest, "experts/e/d.json")
    (folder / "d.json").write_text("{}")
    with pytest.raises(AdapterError, match="the file was changed"):  # nobody vouches for it
        read_json(folder, manifest, "d.json")
    os.truncate(folder / "experts/e/c.json", 1 << 40)
    with pytest.raises(AdapterError, match="size"):
        read_json(folder, manifest, "experts/e/c.json")


def test_tensors_are_as_readable_as_text(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name, content in (("a.safetensors", {"x": torch.zeros(1)}), ("a.json", "{}")):
            writing.write_file(tmp_path / name, content)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
