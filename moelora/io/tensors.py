"""A safetensors file, its header first: names, dtypes, shapes and places are checked before a tensor is read."""

from __future__ import annotations

import math
import os
import re
import weakref
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.io.files import AGAIN, MAX_FILE, fail, open_inside, parse_object, short, take

MAX_HEADER, MAX_WIDTH, MAX_DIMS = 12 << 20, 1 << 22, 8
BLOCK = 1 << 20  # values that are checked at a time
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}
NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")


class Entry(NamedTuple):
    """One tensor of the header. Bytes are counted from the first byte after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file of a folder, open until it is closed or collected.

    entries: what the header says, by name. Raises AdapterError for a header that is not whole, honest and within
    limits; the file is closed then. No tensor is read before it is asked for.
    """

    def __init__(self, folder: Path, name: str, root: Path | None = None) -> None:
        self.path = Path(folder) / name
        self.file = open_inside(folder, name, root)
        self.close = weakref.finalize(self, self.file.close)
        """Release the file."""
        with ExitStack() as stack:
            stack.callback(self.close)
            self.start, self.entries = self._header()
            stack.pop_all()

    def _header(self) -> tuple[int, dict[str, Entry]]:
        """(first byte of the first tensor, entries by name)."""
        size = os.fstat(self.file.fileno()).st_size
        if not 8 <= size <= MAX_FILE:
            fail(self.path, "size", f"{size} bytes", f"8 to {MAX_FILE}", AGAIN)
        length = int.from_bytes(take(self.file, self.path, 8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            fail(self.path, "header", f"{length} bytes in a file of {size}", f"at most {MAX_HEADER}", AGAIN)
        text = take(self.file, self.path, length)
        if not text.startswith(b"{"):
            fail(self.path, "header", short(bytes(text[:8])), "an object", AGAIN)
        header = parse_object(text, self.path)
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            fail(self.path, "__metadata__", short(notes), "an object of strings", AGAIN)
        entries = {name: _entry(name, value, self.path) for name, value in header.items()}
        end = 0
        for entry in sorted(entries.values(), key=attrgetter("begin", "end")):
            if entry.begin != end:
                fail(self.path, entry.name, f"data at byte {short(entry.begin)}", f"it at {end}", AGAIN)
            end = entry.end
        if 8 + length + end != size:
            fail(self.path, "size", f"{size} bytes", f"{8 + length + end} by its header", AGAIN)
        return 8 + length, entries

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, as in the file. Raises AdapterError for NaN or infinite values."""
        entry = self.entries[name]
        values = self._values(entry, entry.begin, entry.end)
        for part in values.split(BLOCK) if entry.dtype.is_floating_point else ():
            if not bool(torch.isfinite(part).all()):
                what = "the training run diverged: train it again"
                fail(self.path, entry.name, "NaN or infinite values", "finite ones", what)
        return values.view(entry.shape)

    def is_zero(self, name: str) -> bool:
        """Whether every value of a tensor is zero; holds a few megabytes of it at a time."""
        entry, step = self.entries[name], BLOCK * self.entries[name].dtype.itemsize
        places = range(entry.begin, entry.end, step)
        return not any(bool(self._values(entry, place, min(place + step, entry.end)).any()) for place in places)

    def _values(self, entry: Entry, begin: int, end: int) -> Tensor:
        """The values between two bytes of the data, in a row."""
        if begin == end:
            return torch.empty(0, dtype=entry.dtype)
        self.file.seek(self.start + begin)
        data = take(self.file, self.path, end - begin)
        if entry.dtype is torch.bool and data.strip(b"\0\1"):
            fail(self.path, entry.name, "a byte that is neither 0 nor 1", "0 and 1", AGAIN)
        return torch.frombuffer(data, dtype=entry.dtype)


def _entry(name: str, value: Any, path: Path) -> Entry:
    if NAME.fullmatch(name) is None:
        fail(path, short(name), "such a name", "letters, digits, '_', '.' and '-', at most 512", AGAIN)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        fail(path, name, short(value), "dtype, shape and data_offsets", AGAIN)
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        fail(path, name, f"dtype {short(kind)}", f"one of {', '.join(DTYPES)}", "save the tensor in one of these")
    if not _integers(shape, MAX_DIMS) or not 0 <= min(shape, default=0) <= max(shape, default=0) <= MAX_WIDTH:
        fail(path, name, f"shape {short(shape)}", f"at most {MAX_DIMS} sizes from 0 to {MAX_WIDTH}", AGAIN)
    count = math.prod(shape) * DTYPES[kind].itemsize
    if (math.prod(size or 1 for size in shape) if count == 0 else count) > MAX_FILE:  # strides of no values count too
        fail(path, name, f"shape {short(shape)}", f"at most {MAX_FILE} bytes", AGAIN)
    if not _integers(offsets, 2) or len(offsets) != 2 or offsets[0] < 0 or offsets[1] - offsets[0] != count:
        fail(path, name, f"data_offsets {short(offsets)}", f"{count} bytes", AGAIN)
    return Entry(name, DTYPES[kind], tuple(shape), offsets[0], offsets[1])


def _integers(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and {*map(type, value)} <= {int}
