"""Files that others wrote: regular files of one folder alone, closed whatever happens, and JSON without surprises."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from moelora.core.errors import AdapterError
from moelora.io import files as io
from moelora.io.files import open_inside, parse_object, read_object, sha256_of, short, take


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def _no_file_stays_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


def said(folder: Path, name: str = "f", root: Path | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        open_inside(folder, name, root)
    assert "expected" in str(caught.value) and ";" in str(caught.value)
    return str(caught.value)


def test_a_file_of_the_folder_is_read(folder: Path, tmp_path: Path) -> None:
    (folder / "f").write_bytes(b"content")
    (folder / "link").symlink_to("f")
    (tmp_path / "alias").symlink_to(folder)
    for place, name in ((folder, "f"), (folder, "link"), (tmp_path / "alias", "f"), (Path(f"{folder}/../folder"), "f")):
        with open_inside(place, name) as file:
            assert take(file, place, 7) == b"content"
    assert sha256_of(folder, "f") == hashlib.sha256(b"content").hexdigest()


def test_links_stay_inside_the_folder_or_the_root_that_is_given(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder2").mkdir()
    (tmp_path / "folder2" / "f").write_bytes(b"x")
    (tmp_path / "f").write_bytes(b"x")
    for target in ("../f", str(tmp_path / "f"), "../folder2/f", "/dev/zero", "/etc/passwd", "../folder/../f"):
        (folder / "f").unlink(missing_ok=True)
        (folder / "f").symlink_to(target)
        assert "leaves the folder" in said(folder)
    (folder / "f").unlink()
    (folder / "f").symlink_to("../folder2/f")
    open_inside(folder, "f", tmp_path).close()
    assert "leaves the folder" in said(folder, root=folder)
    (folder / "sub").symlink_to("..")
    assert "leaves the folder" in said(folder, "sub/f")
    for name in ("../f", str(tmp_path / "f"), "..", "sub/../../f"):
        assert "leaves the folder" in said(folder, name)


def test_what_is_not_there(folder: Path) -> None:
    assert "found nothing" in said(folder)
    assert "found nothing" in said(folder / "none")
    (folder / "f").symlink_to("nowhere")
    assert "No such file" in said(folder)
    (folder / "f").unlink()
    (folder / "f").symlink_to("f")
    assert "broken link" in said(folder)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300, "a/" * 3000, "f/g"])
def test_names_that_no_file_can_have(folder: Path, name: str) -> None:
    (folder / "f").write_bytes(b"")
    said(folder, name)
    said(folder / name)


def test_only_regular_files_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe's writer would go on once somebody opened it, and a device may do anything."""
    os.mkfifo(folder / "pipe")
    (folder / "inner").mkdir()
    (folder / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(".", os.O_RDONLY)
        os.chdir(folder)  # the path of a socket may have 107 bytes
        server.bind("socket")
        os.fchdir(here)
        os.close(here)
    monkeypatch.setattr(os, "open", lambda *args: pytest.fail("opened"))
    for name in ("pipe", "link", "inner", "socket", "", "."):
        assert "expected a regular file" in said(folder, name)


def test_a_pipe_that_takes_the_place_of_a_file_does_not_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "f").write_bytes(b"")
    os.mkfifo(folder / "pipe")
    real = os.open

    def late(path: str, flags: int) -> int:
        os.replace(folder / "pipe", folder / "f")
        return real(path, flags)

    monkeypatch.setattr(os, "open", late)
    assert "expected a regular file" in said(folder)


def test_a_link_that_takes_the_place_of_a_file_is_not_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "f").symlink_to("../secret")
    (tmp_path / "secret").write_bytes(b"secret")
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    monkeypatch.setattr(os, "lstat", os.stat)
    assert "expected a readable file" in said(folder)


def test_what_cannot_be_read_to_its_end(folder: Path) -> None:
    (folder / "f").write_bytes(b"abc")
    with open_inside(folder, "f") as file:
        assert take(file, folder, 0) == b""
        with pytest.raises(AdapterError, match="found 3 bytes, expected 4 more"):
            take(file, folder, 4)
    first_page = "/proc/self/mem"  # which cannot be read
    with open(first_page, "rb") as file, pytest.raises(AdapterError, match="expected a readable file"):
        take(file, folder, 1)


def test_json_objects(folder: Path) -> None:
    (folder / "f").write_text('{"a": [1, 2.5e3, null, {"b": "\\u00e4"}], "A": {}}')
    assert read_object(folder, "f") == {"a": [1, 2500.0, None, {"b": "\u00e4"}], "A": {}}
    with pytest.raises(AdapterError, match="found 49 bytes, expected at most 48"):
        read_object(folder, "f", 48)
    assert read_object(folder, "f", 49)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "JSON"),
        (b"[]", "found list, expected an object"),
        (b"1", "found int, expected an object"),
        (b"\xff\xfe", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"a": "\xed\xa0\x80"}', "JSON"),
        (b"[" * 200_000, "JSON"),
        (b'{"a":' * 100_000, "JSON"),
        (b'{"r": 1, "r": 2}', "'r': found the key twice"),
        (b'{"a": {"b": {"r": 1, "c": 3, "r": 1}}}', "'r': found the key twice"),
        (b'{"a": 1, "\\u0061": 1}', "'a': found the key twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": -1e999}', "-1e999"),
        (b'{"r": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"a": 01}', "JSON"),
        (b'{"a": 1,}', "JSON"),
        (b'{"a": 1} x', "JSON"),
        (b"{'a': 1}", "JSON"),
        (b'{"a": "\n"}', "JSON"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_json_object(text: bytes, part: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_object(bytearray(text), Path("x"))
    assert part in str(caught.value) and len(str(caught.value)) < 300


def test_objects_have_a_limit_of_values() -> None:
    most = io.MAX_ITEMS
    text = bytearray(b'{"a":[' + b",".join([b"0"] * (most - 1)) + b"]}")
    assert len(parse_object(text, Path("x"))["a"]) == most - 1
    for value in (b"0", b"[]", b"{}"):
        text = bytearray(b'{"a":[' + b",".join([value] * (most + 1)) + b"]}")
        with pytest.raises(AdapterError, match=f"expected at most {most}"):
            parse_object(text, Path("x"))


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("\x1b[2J\u202e", "'\\x1b[2J\\u202e'"),
        ([1, "a"], "[1, 'a']"),
        ("a" * 1001, "str of 1001 items"),
        ([0] * 10**6, "list of 1000000 items"),
        (dict.fromkeys(range(1001)), "dict of 1001 items"),
        ("a" * 100, "'" + "a" * 76 + "..."),
        (nested(100_000), "a list"),
        (10**5000, "a int"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_in_messages_are_short_and_plain(value: object, text: str) -> None:
    assert short(value) == text


def test_hashes_of_files_in_folders_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "f").symlink_to("../secret")
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(AdapterError, match="leaves the folder"):
        sha256_of(folder, "f")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(io.MAX_FILE + 1)
    with pytest.raises(AdapterError, match=f"expected at most {io.MAX_FILE}"):
        sha256_of(tmp_path, "large")


def test_files_may_be_opened_by_several_threads(folder: Path) -> None:
    (folder / "f").write_text('{"a": 1}')
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(read_object(folder, "f"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"a": 1}] * 8
