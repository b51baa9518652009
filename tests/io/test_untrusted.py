"""Adapters of strangers: whatever is in them, AdapterError or the adapter, soon, in little memory, in their folder.

Thousands of mutations of valid files, by hypothesis here and at random in a process that Python's audit events watch.
Bounds: processor time of each case; address space of the process (RLIMIT_AS) and what Python allocates (tracemalloc).
"""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moelora.core.errors import AdapterError
from moelora.io.files import open_inside
from moelora.io.patterns import Budget
from moelora.io.peft import CONFIG, WEIGHTS
from tests.io import hostile
from tests.io.hostile import CONFIGS, FILES, confused, put, spoiled, swapped, take_all, with_header
from tests.io.written import peak, reset_peak

SECONDS = 0.9  # of the processor, for one case; the patterns of one adapter have 0.3 of them
DRAW = st.randoms(use_true_random=True)  # draws no more than a seed: fast, and a case is found again
WHICH = st.integers(0, len(FILES) - 1)
WARNINGS = ("unknown settings, all off", "is zero, so the adapter changes nothing")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder for one case after the other, in memory where there is such a place."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        take_all(put(Path(path), CONFIGS[0], FILES[0]))
        yield Path(path)


@contextmanager
def watched(folder: Path, seconds: float = SECONDS) -> Iterator[list[str]]:
    """Notes every file that is opened, and fails for one outside the folder, one left open, other warnings, or time."""
    opened: list[str] = []
    patch = pytest.MonkeyPatch()

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def note(path: Any, *args: Any, **options: Any) -> Any:
            opened.extend([] if isinstance(path, int) else [os.path.realpath(path)])  # a number: open already
            return real(path, *args, **options)

        return note

    for owner, name in ((os, "open"), (builtins, "open"), (io, "open")):
        patch.setattr(owner, name, noting(getattr(owner, name)))
    handles, begun = len(os.listdir("/proc/self/fd")), time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield opened
        finally:
            patch.undo()
    assert time.process_time() - begun < seconds
    assert len(os.listdir("/proc/self/fd")) <= handles  # others may have been collected meanwhile
    assert [path for path in opened if not Path(path).is_relative_to(os.path.realpath(folder))] == []
    assert [str(one.message) for one in said if not any(part in str(one.message) for part in WARNINGS)] == []


def attempt(folder: Path) -> bool:
    """Whether the adapter can be read, all of it. Nothing but AdapterError, with one short line, may say that not."""
    with watched(folder) as opened:
        try:
            take_all(folder)
            read = True
        except AdapterError as error:
            read, text = False, str(error)
            assert str(folder) in text and "found" in text and "expected" in text
            assert text.isprintable() and len(text) < 2000
    assert {os.path.basename(path) for path in opened} <= {CONFIG, WEIGHTS}
    return read


def test_the_valid_adapters_are_read(place: Path) -> None:
    for config, weights in zip(CONFIGS, FILES, strict=True):
        assert attempt(put(place, config, weights))


@settings(max_examples=300)
@given(WHICH, DRAW)
def test_bytes_of_the_header(place: Path, which: int, draw: random.Random) -> None:
    weights = FILES[which]
    attempt(put(place, CONFIGS[which], spoiled(draw, weights, 8 + int.from_bytes(weights[:8], "little"))))


@settings(max_examples=300)
@given(WHICH, DRAW)
def test_values_of_the_header(place: Path, which: int, draw: random.Random) -> None:
    attempt(put(place, CONFIGS[which], with_header(draw, FILES[which], lambda header: confused(draw, header))))


@settings(max_examples=150)
@given(WHICH, DRAW)
def test_entries_of_the_header_that_are_exchanged(place: Path, which: int, draw: random.Random) -> None:
    attempt(put(place, CONFIGS[which], with_header(draw, FILES[which], lambda header: swapped(draw, header))))


@settings(max_examples=250)
@given(WHICH, DRAW)
def test_bytes_of_the_configuration(place: Path, which: int, draw: random.Random) -> None:
    attempt(put(place, spoiled(draw, CONFIGS[which], len(CONFIGS[which])), FILES[which]))


@settings(max_examples=300)
@given(WHICH, DRAW)
def test_values_of_the_configuration(place: Path, which: int, draw: random.Random) -> None:
    attempt(put(place, json.dumps(confused(draw, json.loads(CONFIGS[which]))).encode(), FILES[which]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(json.loads(CONFIGS[0]))), JSON)
def test_any_value_of_any_setting(place: Path, key: str, value: Any) -> None:
    attempt(put(place, json.dumps({**json.loads(CONFIGS[0]), key: value}).encode(), FILES[0]))


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "more"]), JSON), JSON)
def test_any_value_in_an_entry(place: Path, changes: dict[str, Any], notes: Any) -> None:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = sorted(header)[2]
        return {**header, name: {**header[name], **changes}, **({"__metadata__": notes} if "more" in changes else {})}

    attempt(put(place, CONFIGS[0], with_header(random.Random(1), FILES[0], change)))


LETTERS = st.text("ab.*+?()[]{}|^$\\,-0159:=!<>PiswdbB#&~ \t\n\u00e4", max_size=40)
PARTS = st.lists(st.sampled_from(["(", "(?:", "(a|a)", ")*", ")+", "a*", "{9}", "|", "[bc]", r"\w", "(?=", ")", "."]))


@settings(max_examples=300)
@given(LETTERS | PARTS.map("".join) | st.text(max_size=300))
@example("(a|a)*[bc]")
@example("(" * 100 + "a" + ")*" * 78)
@example("[[a]--[b]]")
def test_any_pattern(pattern: str) -> None:
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for find in (
            lambda budget: budget.pattern("target_modules", pattern),
            lambda budget: budget.lookup("rank_pattern", {pattern: 1}, 0, 3),
        ):
            text = ""
            try:
                matches = find(Budget(Path(CONFIG), 0.1))
                for module in ("a" * 300, "ab.ab", "model.layers.0.q_proj"):
                    matches(module)
            except AdapterError as error:
                text = str(error)
            assert text.isprintable() and len(text) < 600
    assert time.process_time() - begun < SECONDS


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder within others; what may be read says 'inside'."""
    top = tmp_path_factory.mktemp("tree")
    for path, text in (("secret", "x"), ("root/shared", "root"), ("root/other/f", "root"), ("root/folder2/f", "root")):
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(text)
    (top / "root/folder/sub").mkdir(parents=True)
    for path in ("f", "sub/f", "\u00e4", "a b", "...", "-"):
        (top / "root/folder" / path).write_text("inside")
    os.mkfifo(top / "root/folder/pipe")
    return top


STEPS = st.sampled_from(
    [
        "..",
        ".",
        "",
        "f",
        "sub",
        "folder",
        "folder2",
        "root",
        "other",
        "shared",
        "secret",
        "link",
        "pipe",
        "\u00e4",
        "a b",
    ]
) | st.text(max_size=5)


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=6), st.lists(STEPS, max_size=6), st.booleans(), st.booleans(), st.booleans())
def test_any_path_and_link(
    tree: Path, steps: list[str], target: list[str], absolute: bool, wide: bool, through: bool
) -> None:
    """Whatever is opened is a regular file inside, and it is what the system itself finds at that path."""
    folder, root = tree / "root/folder", tree / "root" if wide else None
    link = folder / "link"
    link.unlink(missing_ok=True)
    to = "/".join(target)
    if to and "\0" not in to:
        try:
            link.symlink_to(f"{tree}/root/{to}" if absolute else to)
        except (OSError, UnicodeEncodeError):
            to = ""
    name = "/".join(["link", *steps[:2]] if through else steps)
    with watched(root or folder):
        try:
            with open_inside(folder, name, root) as file:
                text, found = file.read(), os.fstat(file.fileno())
        except AdapterError:
            return
    assert text == b"inside" or (wide and text == b"root")
    assert stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.stat(folder / name))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["zero", "random", "outside", "itself", "pipe", "socket", "folder", "pickle", "tty"])
def test_what_stands_in_the_place_of_a_file(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    path = put(folder, CONFIGS[0], FILES[0]) / name
    content = path.read_bytes()
    path.unlink()
    (tmp_path / "outside").write_bytes(content)
    targets = {
        "zero": "/dev/zero",
        "random": "/dev/urandom",
        "outside": "../outside",
        "itself": name,
        "tty": "/dev/tty",
    }
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pickle":
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    else:
        with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)  # the path of a socket may have 107 bytes
            server.bind(name)
    tracemalloc.start()
    try:
        assert not attempt(folder)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert not (folder / "ran").exists()


def test_pickles_beside_are_not_opened(tmp_path: Path) -> None:
    put(tmp_path, CONFIGS[0], FILES[0])
    for name in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pkl", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    assert attempt(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert not attempt(tmp_path)


def test_memory_stays_near_that_of_the_tensors(tmp_path: Path) -> None:
    """Of a tensor of 64 MB, there is one copy and little beside it, also while its values are checked."""
    header, data = hostile.honest(
        ["q.lora_A.weight", "q.lora_B.weight"], lambda name: [[1 << 20, 32], [32, 1]]["A" in name]
    )
    config = json.dumps({"peft_type": "LORA", "r": 32, "lora_alpha": 8}).encode()
    (tmp_path / "warm").mkdir()
    put(tmp_path, config, len(header).to_bytes(8, "little") + header)
    os.truncate(tmp_path / WEIGHTS, 8 + len(header) + data)
    take_all(put(tmp_path / "warm", CONFIGS[0], FILES[0]))
    before = reset_peak()
    with watched(tmp_path, 2):
        take_all(tmp_path)
    assert 0.9 * data < peak() - before < data + (16 << 20)


def test_thousands_more_in_a_process_with_little_memory(place: Path) -> None:
    """Only the two files are opened; nothing is imported, run, written, connected to or left open."""
    command = [sys.executable, "-m", "tests.io.hostile", str(place), "20", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["escaped"], said["outside"], said["handles"]) == ([], [], 0)
    assert said["events"].keys() == {"open"}
    assert 2000 < said["refused"] < 3000
    assert said["slowest"][0] < SECONDS and said["slowest large"][0] < 2, said
