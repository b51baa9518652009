"""Reading files that others wrote: regular files of one folder only, within limits, JSON without surprises."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from moelora.core.errors import AdapterError

MAX_CONFIG, MAX_FILE = 1 << 20, 32 << 30  # bytes
MAX_ITEMS = 450_000  # values in a JSON text: a header of 56,000 tensors
FLAGS = os.O_RDONLY | sum(getattr(os, f"O_{name}", 0) for name in ("NONBLOCK", "NOCTTY", "NOFOLLOW", "BINARY"))
FIX = "correct the file, or save the adapter again"
AGAIN = "the file is damaged or incomplete: copy or save the adapter again"


def fail(path: Path | str, key: str, found: str, expected: str, remedy: str) -> NoReturn:
    """Raise AdapterError in the words of all such errors."""
    raise AdapterError(f"{path}: {key}: found {found}, expected {expected}; {remedy}")


def short(value: object) -> str:
    """A value for an error message: printable ASCII, at most 80 characters."""
    if isinstance(value, str | bytes | list | tuple | dict) and len(value) > 1000:
        return f"{type(value).__name__} of {len(value)} items"
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def open_inside(folder: Path, name: str, root: Path | None = None) -> io.BufferedReader:
    """A regular file of the folder, opened for reading. Links may lead anywhere inside ``root`` (the folder itself).

    Raises AdapterError, with ``found nothing`` where there is no such file. Pipes and devices are never opened.
    """
    path, handle = Path(folder) / name, -1
    try:
        real = os.path.realpath(path)
        inside = Path(real).is_relative_to(os.path.realpath(folder if root is None else root))
        there = os.path.lexists(path)
        if inside and there and (regular := stat.S_ISREG(os.lstat(real).st_mode)):
            handle = os.open(real, FLAGS)
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        if handle >= 0:
            os.close(handle)
        reason = str(error.strerror) if isinstance(error, OSError) else short(str(error))
        fail(path, "file", reason, "a readable file", "check the path and its permissions")
    if not inside:
        fail(path, "link", "a path that leaves the folder", "a file in it", "copy the file itself into the folder")
    if not there:
        fail(path, "file", "nothing", "a file", "check the path")
    if not regular:
        if handle >= 0:
            os.close(handle)
        fail(path, "file", "a folder, pipe, device or broken link", "a regular file", AGAIN)
    return os.fdopen(handle, "rb")


def take(file: io.BufferedReader, path: Path, count: int) -> bytearray:
    """The next ``count`` bytes of a file; the caller bounds the count by the size of the file."""
    data, done = bytearray(count), 0
    try:
        while done < count and (more := file.readinto(memoryview(data)[done:])):
            done += more
    except OSError as error:
        fail(path, "file", str(error.strerror), "a readable file", AGAIN)
    if done < count:
        fail(path, "file", f"{done} bytes", f"{count} more", AGAIN)
    return data


def read_object(folder: Path, name: str, limit: int = MAX_CONFIG, root: Path | None = None) -> dict[str, Any]:
    """A JSON object of the folder, of at most ``limit`` bytes. Raises AdapterError."""
    path = Path(folder) / name
    with open_inside(folder, name, root) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            fail(path, "size", f"{size} bytes", f"at most {limit}", AGAIN)
        return parse_object(take(file, path, size), path)


def parse_object(text: bytearray, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys, with finite numbers and few values for its size. Raises AdapterError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            fail(path, short(key), "the key twice", "it once", AGAIN)
        return found

    def constant(name: str) -> NoReturn:
        fail(path, "JSON", name, "finite numbers", AGAIN)

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            constant(short(digits))
        return value

    items = sum(map(text.count, b"[{,"))  # values take much more memory than their text
    if items > MAX_ITEMS:
        fail(path, "JSON", f"about {items} values", f"at most {MAX_ITEMS}", "split it")
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=constant, parse_float=number)
    except AdapterError:
        raise
    except (ValueError, RecursionError) as error:
        fail(path, "JSON", short(str(error)), "JSON text", AGAIN)
    if not isinstance(found, dict):
        fail(path, "JSON", type(found).__name__, "an object", AGAIN)
    return found


def sha256_of(folder: Path, name: str, root: Path | None = None, limit: int | None = MAX_FILE) -> str:
    """The SHA-256 of a file of the folder, in hexadecimal. limit: bytes of a file that others may have made."""
    digest = hashlib.sha256()
    with open_inside(folder, name, root) as file:
        if (size := os.fstat(file.fileno()).st_size) > (limit or size):
            fail(Path(folder) / name, "size", f"{size} bytes", f"at most {limit}", AGAIN)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
