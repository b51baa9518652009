"""safetensors files: the header alone first, whole and honest, and no tensor before it is asked for."""

from __future__ import annotations

import gc
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from moelora.core.errors import AdapterError
from moelora.io import tensors as io
from moelora.io.tensors import TensorFile

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def put(folder: Path, header: bytes | dict[str, Any], data: bytes | int = b"", length: int | None = None) -> Path:
    """A file of this header; data: bytes, or how many (as a hole)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(folder / "f", "wb") as file:
        file.write(struct.pack("<Q", len(text) if length is None else length) + text)
        if isinstance(data, bytes):
            file.write(data)
        else:
            file.truncate(8 + len(text) + data)
    return folder


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(AdapterError) as caught:
        TensorFile(folder, "f")
    text = str(caught.value)
    assert [part for part in (str(folder / "f"), "expected", ";", *parts) if part not in text] == [], text
    assert len(text) < 800 and text.isprintable()


TENSORS = {
    **{f"f.{dtype}": torch.randn(3, 5).to(dtype) for dtype in (torch.float64, torch.float32)},
    **{f"h.{dtype}": torch.randn(2, 3, 4).to(dtype) for dtype in (torch.float16, torch.bfloat16)},
    **{f"i.{dtype}": torch.arange(7).to(dtype) for dtype in (torch.int64, torch.int32, torch.uint8)},
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


def test_every_dtype_and_shape_is_read_as_safetensors_wrote_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(save(TENSORS, {"format": "pt"}))
    file = TensorFile(tmp_path, "f")
    assert file.entries.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        name_, dtype, shape, begin, end = file.entries[name]
        assert (name_, dtype, shape, end - begin) == (name, expected.dtype, expected.shape, expected.nbytes)
        found = file.read(name)
        assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
    found = file.read("scalar")
    found += 1  # its own memory
    assert file.read("scalar") == 3.5
    with pytest.raises(KeyError):
        file.read("no")


def test_the_order_of_the_header_does_not_matter(tmp_path: Path) -> None:
    later = {**GOOD, "data_offsets": [16, 32]}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [16, 16]}
    file = TensorFile(put(tmp_path, {"b": later, "e": empty, "a": GOOD}, bytes(16) + b"\0\0\x80\x3f" * 4), "f")
    assert file.read("a").sum() == 0 and file.read("b").sum() == 4 and file.read("e").shape == (0,)


@pytest.mark.parametrize(
    ("change", "data", "part"),
    [
        ({"dtype": "F8_E4M3"}, 16, "dtype 'F8_E4M3'"),
        ({"dtype": "f32"}, 16, "dtype"),
        ({"dtype": ["F32"]}, 16, "dtype ['F32']"),
        ({"dtype": None}, 16, "dtype"),
        ({"dtype": "F16"}, 16, "data_offsets"),
        ({"shape": [2, 3]}, 16, "24 bytes"),
        ({"shape": [2, 2.0]}, 16, "shape"),
        ({"shape": [True, 4]}, 16, "shape"),
        ({"shape": [-2, -2]}, 16, "shape"),
        ({"shape": 4}, 16, "shape"),
        ({"shape": "22"}, 16, "shape"),
        ({"shape": {"0": 4}}, 16, "shape"),
        ({"shape": [None]}, 16, "shape"),
        ({"shape": [[4]]}, 16, "shape"),
        ({"shape": [1] * 9}, 16, "at most 8 sizes"),
        ({"shape": [1, 1 << 23]}, 16, "shape"),
        ({"shape": [4, 1 << 60]}, 16, "shape"),
        ({"shape": [1 << 22] * 8}, 16, f"at most {io.MAX_FILE} bytes"),
        ({"shape": [0] + [1 << 22] * 7, "data_offsets": [0, 0]}, 0, f"at most {io.MAX_FILE} bytes"),
        ({"data_offsets": [-16, 0]}, 16, "data_offsets"),
        ({"data_offsets": [0]}, 16, "data_offsets"),
        ({"data_offsets": [0, 16, 32]}, 16, "data_offsets"),
        ({"data_offsets": [0.0, 16.0]}, 16, "data_offsets"),
        ({"data_offsets": [False, 16]}, 16, "data_offsets"),
        ({"data_offsets": {"0": 0}}, 16, "data_offsets"),
        ({"data_offsets": [16, 0]}, 16, "data_offsets"),
        ({"data_offsets": [10**4000, 10**4000 + 16]}, 16, "data at byte 1000"),
        ({"data_offsets": [4, 20]}, 20, "data at byte 4, expected it at 0"),
        ({"extra": 1}, 16, "dtype, shape and data_offsets"),
        ({"shape": ...}, 16, "dtype, shape and data_offsets"),
        ({}, 15, "size: found"),
        ({}, 17, "size: found"),
        ({}, 0, "size: found"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_entries_that_lie(tmp_path: Path, change: dict[str, Any], data: int, part: str) -> None:
    entry = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    refused(put(tmp_path, {"a": entry}, data), part)


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, [GOOD], True], ids=repr)
def test_entries_that_are_none(tmp_path: Path, value: object) -> None:
    refused(put(tmp_path, {"a": value}, 16), "a: found", "dtype, shape and data_offsets")


def test_data_belongs_to_one_tensor_each(tmp_path: Path) -> None:
    refused(put(tmp_path, {"a": GOOD, "b": GOOD}, 16), "b: found data at byte 0, expected it at 16")
    refused(put(tmp_path, {"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}}, 24), "b: found data at byte 8")
    refused(put(tmp_path, {"a": GOOD, "b": {**GOOD, "data_offsets": [20, 36]}}, 36), "b: found data at byte 20")
    twice = json.dumps({"a": GOOD})[:-1] + ', "a": ' + json.dumps({**GOOD, "data_offsets": [16, 32]}) + "}"
    refused(put(tmp_path, twice.encode(), 32), "'a': found the key twice")


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a/b", "../a", "a\0b", "a\n", "\u00e4", "\u202ea", "a" * 513, "a:b", "\x1b[2J", "\ud800"],
    ids=lambda name: ascii(name)[:20],
)
def test_names_that_are_not_plain(tmp_path: Path, name: str) -> None:
    refused(put(tmp_path, {name: GOOD}, 16), "such a name")


@pytest.mark.parametrize("notes", [{"format": "pt"}, {}, {"a": "{[,"}])
def test_metadata_is_strings(tmp_path: Path, notes: object) -> None:
    assert TensorFile(put(tmp_path, {"__metadata__": notes, "a": GOOD}, 16), "f").entries.keys() == {"a"}


@pytest.mark.parametrize("notes", [None, [], "x", {"a": 1}, {"a": {}}, {"a": None}], ids=repr)
def test_metadata_that_is_not(tmp_path: Path, notes: object) -> None:
    refused(put(tmp_path, {"__metadata__": notes, "a": GOOD}, 16), "__metadata__")


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b' {"a": 1}', None),
        (b"{}", 1 << 63),
        (b"{}", (1 << 64) - 1),
        (b"{}", 3),
        (b"{}", 0),
        (b"{}" + bytes(io.MAX_HEADER), io.MAX_HEADER + 1),
        (b'{"a":' * 5000, None),
        (b"\x80\x04\x95" + b"." * 30, None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_headers_that_are_none(tmp_path: Path, text: bytes, length: int | None) -> None:
    refused(put(tmp_path, text, length=length))


def test_headers_begin_at_once_and_end_in_the_file(tmp_path: Path) -> None:
    text = json.dumps({"a": GOOD}).encode()
    assert TensorFile(put(tmp_path, text + b"  ", 16), "f").entries
    for space in (b" ", b"\n", b"\xef\xbb\xbf"):
        refused(put(tmp_path, space + text, 16), "header")
    refused(put(tmp_path, b"{}", length=3), "header: found 3 bytes in a file of 10")


def test_files_too_short_and_too_long(tmp_path: Path) -> None:
    for content in (b"", b"\1\0", b"\2\0\0\0\0\0\0"):
        (tmp_path / "f").write_bytes(content)
        refused(tmp_path, "size")
    refused(put(tmp_path, b"{}", io.MAX_FILE), "size", f"8 to {io.MAX_FILE}")


def test_truncated_everywhere(tmp_path: Path) -> None:
    whole = save({"a": torch.ones(3, 3), "b": torch.ones(2)}, {"format": "pt"})
    for count in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:count])
        refused(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, io.BLOCK - 1, io.BLOCK, io.BLOCK + 2])
def test_values_are_finite(tmp_path: Path, bad: float, dtype: torch.dtype, place: int) -> None:
    value = torch.zeros(io.BLOCK + 3, dtype=dtype)
    value[place] = bad
    (tmp_path / "f").write_bytes(save({"a": value}))
    file = TensorFile(tmp_path, "f")
    with pytest.raises(AdapterError, match="a: found NaN or infinite values"):
        file.read("a")
    value[place] = torch.finfo(dtype).max
    (tmp_path / "f").write_bytes(save({"a": value}))
    assert torch.equal(TensorFile(tmp_path, "f").read("a"), value)


def test_truth_values_are_0_or_1(tmp_path: Path) -> None:
    entry = {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}
    assert TensorFile(put(tmp_path, {"a": entry}, b"\0\1\1\0"), "f").read("a").tolist() == [False, True, True, False]
    for data in (b"\2\0\0\0", b"\0\1\xff\1"):
        with pytest.raises(AdapterError, match="neither 0 nor 1"):
            TensorFile(put(tmp_path, {"a": entry}, data), "f").read("a")


def test_zero_is_found_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "BLOCK", 4)
    taken: list[int] = []
    take = io.take
    monkeypatch.setattr(io, "take", lambda file, path, count: taken.append(count) or take(file, path, count))
    values = {"zero": torch.zeros(10), "minus": -torch.zeros(10), "last": torch.arange(10) == 9, "none": torch.ones(0)}
    values["first"] = torch.tensor([1e-45] + [0.0] * 9)
    (tmp_path / "f").write_bytes(save(values))
    file = TensorFile(tmp_path, "f")
    taken.clear()
    assert {name: file.is_zero(name) for name in values} == {
        **{"zero": True, "minus": True, "last": False, "none": True, "first": False}
    }
    assert max(taken) == 16 and len(taken) == 3 + 3 + 3 + 0 + 1


def test_a_file_that_is_cut_after_its_header_was_read(tmp_path: Path) -> None:
    large = {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}
    file = TensorFile(put(tmp_path, {"a": large}, 1 << 20), "f")
    os.truncate(tmp_path / "f", (tmp_path / "f").stat().st_size - 1)
    with pytest.raises(AdapterError, match="found 1048575 bytes, expected 1048576 more"):
        file.read("a")


def test_files_are_closed_with_their_object_and_after_errors(tmp_path: Path) -> None:
    def opened() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path / "f") for fd in os.listdir("/proc/self/fd"))

    gc.disable()
    try:
        put(tmp_path, {"a": {**GOOD, "dtype": "no"}}, 16)
        with pytest.raises(AdapterError) as caught:
            TensorFile(tmp_path, "f")
        assert opened() == 0 and caught  # though the traceback still holds the object
        file = TensorFile(put(tmp_path, {"a": GOOD}, 16), "f")
        assert opened() == 1
        file.close()
        file.close()
        assert opened() == 0
        file = TensorFile(tmp_path, "f")
        del file
        assert opened() == 0
    finally:
        gc.enable()


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "BOOL", "F64"]),
        "shape": st.lists(st.integers(0, 3), max_size=3),
        "data_offsets": st.tuples(st.integers(0, 24), st.integers(0, 40)).map(list),
    }
)


@settings(max_examples=300)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY, max_size=3),
    length=st.integers(0, 64),
)
def test_what_is_read_here_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], length: int
) -> None:
    """Two readers that see different tensors in one file would be a way to smuggle."""
    sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
    end = 0
    for entry in header.values():  # mostly honest
        if length % 3:
            count = int(torch.Size(entry["shape"]).numel()) * sizes[entry["dtype"]]
            entry["data_offsets"] = [end, end + count]
        end = entry["data_offsets"][1]
    folder = put(tmp_path_factory.getbasetemp(), header, bytes(end if length % 5 else length))
    try:
        file = TensorFile(folder, "f")
    except AdapterError:
        return
    expected = load((folder / "f").read_bytes())
    assert file.entries.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(file.read(name), value) and file.entries[name].dtype == value.dtype
