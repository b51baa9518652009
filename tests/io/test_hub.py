"""Hub ids: the real client of the hub, against a small hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import close_session, constants
from safetensors.torch import save

from moelora.core.errors import AdapterError
from moelora.io.files import MAX_CONFIG
from moelora.io.folder import MANIFEST, MAX_MANIFEST, read_manifest, read_tensors, write_folder
from moelora.io.hub import Located, locate
from moelora.io.peft import CONFIG, WEIGHTS, read_peft
from moelora.io.tensors import MAX_FILE

REPO = "org/lora"
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"  # commits
KEY = "base_model.model.lin.lora_"
EXPERT = f"experts/expert_0/{WEIGHTS}"


def adapter(value: float = 1.0) -> dict[str, bytes]:
    """The files of a PEFT LoRA of one layer, whose A is filled with a value."""
    tensors = {f"{KEY}A.weight": torch.full((2, 3), value), f"{KEY}B.weight": torch.ones(4, 2)}
    return {CONFIG: json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}).encode(), WEIGHTS: save(tensors)}


def mixture(folder: Path) -> dict[str, bytes]:
    """The files of a moelora folder."""
    manifest = {
        "moelora": "0",
        "base": {"model": "m", "cls": "C"},
        "adapter": {},
        "sites": [],
        "experts": ["expert_0"],
    }
    expert = adapter()
    write_folder(
        folder,
        manifest,
        {
            "README.md": "hello\n",
            "router.safetensors": {"w": torch.arange(3.0)},
            EXPERT: {"x": torch.ones(2)},
            f"experts/expert_0/{CONFIG}": expert[CONFIG].decode(),
        },
    )
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def relisted(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    """A mixture whose manifest lists other files as well."""
    manifest = json.loads(files[MANIFEST])
    manifest["files"].update(dict.fromkeys(names, "0" * 64))
    return {**files, **dict.fromkeys(names, b"x"), MANIFEST: json.dumps(manifest).encode()}


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


@dataclass
class Hub:
    """Repositories: files by commit and name. What the hub says of a file can be made to differ from what it has."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=lambda: {"main": NEW})
    says: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [line.partition("?file=")[2] for line in self.seen if line.startswith("GET /cdn/")]

    def answer(self, target: str, port: int) -> tuple[int, dict[str, str], bytes]:
        path = urlsplit(target).path
        found = next((answer for start, answer in self.answers.items() if path.startswith(start)), None)
        if found is not None:
            return found
        if path.startswith(f"/api/models/{REPO}"):
            revision = unquote(path.removeprefix(f"/api/models/{REPO}").removeprefix("/revision/")) or "main"
            commit = self.refs.get(revision, revision)
            if commit not in self.commits:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            siblings = [self._said(name, content) for name, content in self.commits[commit].items()]
            return 200, {}, json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode()
        parts = path.split("/")
        if path.startswith(f"/{REPO}/resolve/") and parts[4] in self.commits:
            commit, name = parts[4], "/".join(parts[5:])
            if name not in self.commits[commit]:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            content = self.commits[commit][name]
            digest = hashlib.sha256(content).hexdigest()
            said = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            # As on the hub, the content is on another host.
            return 302, {**said, "Location": f"http://localhost:{port}/cdn/{commit}?file={name}"}, b""
        if path.startswith("/cdn/"):
            return 200, {}, self.commits[path[5:]][target.partition("?file=")[2]]
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _said(self, name: str, content: bytes) -> dict[str, Any]:
        said: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if is_lfs(name):
            said["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        change = self.says.get(name, {})
        return {**said, **change, **({"lfs": {**said["lfs"], **change}} if is_lfs(name) else {})}


@dataclass
class Serving:
    """A hub and the server it speaks through."""

    hub: Hub
    server: http.server.ThreadingHTTPServer

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        close_session()


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    hub = Hub({OLD: adapter(0.5), NEW: {**adapter(), "README.md": b"hello", "pytorch_model.bin": b"pickle"}})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.seen.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path, self.server.server_port)  # type: ignore[attr-defined]
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    cache = tmp_path / "hf"
    for key, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "AGENT_HARNESSES_PATH": str(cache / "agents.json"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, key, value)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.chdir(tmp_path)
    close_session()
    running = Serving(hub, server)
    yield running
    running.stop()


@pytest.fixture
def hub(serving: Serving) -> Hub:
    return serving.hub


def fault(entry: str | Path) -> str:
    with pytest.raises(AdapterError) as caught:
        locate(entry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def value_of(found: Located) -> float:
    return float(read_peft(found.folder, found.root).read("lin").A[0, 0])


# A PEFT adapter


def test_a_name_is_the_default_branch_at_its_commit(hub: Hub) -> None:
    found = locate(REPO)
    assert found.pin == f"{REPO}@{NEW}" and value_of(found) == 1.0


def test_exactly_two_files_are_downloaded(hub: Hub) -> None:
    found = locate(REPO)
    assert sorted(hub.fetched()) == sorted([CONFIG, WEIGHTS])
    assert sorted(path.name for path in found.folder.iterdir()) == sorted([CONFIG, WEIGHTS])
    assert not [line for line in hub.seen if "/resolve/" in line and NEW not in line]  # all of one commit


@pytest.mark.parametrize("name", ["v1.0", "refs/pr/3", "feature/x"])
def test_tags_and_branches(hub: Hub, name: str) -> None:
    hub.refs[name] = OLD
    found = locate(f"{REPO}@{name}")
    assert found.pin == f"{REPO}@{OLD}" and value_of(found) == 0.5


def test_a_branch_that_moves_is_followed(hub: Hub) -> None:
    hub.refs["main"] = OLD
    assert value_of(locate(REPO)) == 0.5
    hub.refs["main"] = NEW
    assert value_of(locate(REPO)) == 1.0


def test_a_commit_is_downloaded_once_and_then_needs_no_hub(serving: Serving) -> None:
    first = locate(f"{REPO}@{OLD}")
    serving.stop()
    assert locate(f"{REPO}@{OLD}") == first and value_of(first) == 0.5
    assert locate(first.pin or "") == first


def test_a_commit_that_is_in_the_cache_in_part_is_completed(hub: Hub) -> None:
    found = locate(f"{REPO}@{OLD}")
    (found.folder / WEIGHTS).unlink()
    assert value_of(locate(f"{REPO}@{OLD}")) == 0.5


def test_a_commit_is_that_commit(hub: Hub) -> None:
    hub.refs[OLD] = NEW
    assert f"commit: found '{NEW}', expected {OLD}" in fault(f"{REPO}@{OLD}")


@pytest.mark.parametrize("at", ["", f"@{NEW}"])
def test_a_folder_of_a_repository(serving: Serving, at: str) -> None:
    inner = {f"runs/best/{name}": content for name, content in adapter(0.25).items()}
    serving.hub.commits[NEW] = {**adapter(), **inner}
    found = locate(f"{REPO}/runs/best{at}")
    assert found.pin == f"{REPO}/runs/best@{NEW}" and value_of(found) == 0.25
    assert serving.hub.fetched() == [f"runs/best/{CONFIG}", f"runs/best/{WEIGHTS}"]
    serving.stop()
    assert locate(found.pin) == found


def test_links_into_the_cache_of_the_repository_are_what_root_is_for(hub: Hub) -> None:
    found = locate(REPO)
    assert (found.folder / WEIGHTS).is_symlink() and found.root == Path(constants.HF_HUB_CACHE) / "models--org--lora"
    with pytest.raises(AdapterError, match="leaves the folder"):
        read_peft(found.folder)


# Refused before anything is downloaded


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (WEIGHTS, {"size": MAX_FILE + 1}),
        (CONFIG, {"size": MAX_CONFIG + 1}),
        (WEIGHTS, {"size": None}),
        (CONFIG, {"size": None}),
        (CONFIG, {"size": -1}),
    ],
)
def test_a_size_over_the_cap_or_unknown(hub: Hub, name: str, said: dict[str, Any]) -> None:
    hub.says[name] = said
    message = fault(REPO)
    assert f"{REPO}: {name}: size: found {said['size']} bytes" in message and "nothing was downloaded" in message
    assert [line for line in hub.seen if "/resolve/" in line or "/cdn/" in line] == []
    assert not Path(constants.HF_HUB_CACHE).exists()


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_a_large_file_within_its_own_cap_is_downloaded(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.commits[NEW] = adapter() if name == WEIGHTS else mixture(tmp_path / "made")
    hub.says[name] = {"size": MAX_CONFIG + 1}
    assert f"{name}: content: found" in fault(REPO) and name in hub.fetched()


@pytest.mark.parametrize("sub", ["", "sub/"])
def test_a_pickle_alone(hub: Hub, sub: str) -> None:
    hub.commits[NEW] = {f"{sub}{CONFIG}": adapter()[CONFIG], f"{sub}adapter_model.bin": b"pickle"}
    message = fault(f"{REPO}/{sub}".rstrip("/"))
    assert "adapter_model.bin: format: found a pickle" in message and "safe_serialization=True" in message
    assert not [line for line in hub.seen if "/resolve/" in line]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(hub: Hub, name: str) -> None:
    del hub.commits[NEW][name]
    assert f"no {name} at {NEW[:12]}" in fault(REPO) and not hub.fetched()


def test_folders_that_hold_adapters_are_named(hub: Hub) -> None:
    hub.commits[NEW] = {f"runs/{name}": content for name, content in adapter().items()}
    assert "adapters are in its folders ['runs']" in fault(REPO)


def test_a_folder_that_is_not_there(hub: Hub) -> None:
    hub.commits[NEW] = {f"runs/last/{name}": content for name, content in adapter().items()}
    assert f"no {CONFIG} at" in fault(f"{REPO}/runs/best") and not hub.fetched()


def test_two_adapters_in_one_folder(hub: Hub, tmp_path: Path) -> None:
    hub.commits[NEW] = {**adapter(), **mixture(tmp_path / "made")}
    assert f"found {MANIFEST} and {CONFIG}" in fault(REPO) and not hub.fetched()


# Answers other than files


@pytest.mark.parametrize(
    ("start", "answer", "words"),
    [
        ("/api", (404, {"X-Error-Code": "RepoNotFound"}, b""), ["repository: found none", "hf auth login"]),
        ("/api", (404, {"X-Error-Code": "RevisionNotFound"}, b""), ["revision: found nothing of this name"]),
        ("/org", (403, {"X-Error-Code": "GatedRepo"}, b""), ["a gated one", f"/{REPO}, and log in with"]),
        ("/api", (401, {}, b""), ["401 Unauthorized", "log in with `hf auth login`"]),
        ("/org", (403, {"X-Error-Message": "Access to this resource is disabled."}, b""), ["is disabled", "hf auth"]),
        ("/api", (503, {}, b""), ["503 Service Unavailable", "check the connection"]),
        ("/api", (200, {}, b"<html>Welcome to this hotel</html>"), ["JSONDecodeError", "check the connection"]),
        ("/api", (200, {}, b"{}"), ["KeyError"]),
        ("/api", (200, {}, b"[]"), ["TypeError"]),
        ("/api", (200, {}, b'{"id": "x", "siblings": []}'), ["commit: found '', expected 40 digits"]),
        ("/api", (200, {}, b'{"id": "x", "sha": "../../x", "siblings": []}'), ["commit: found '../../x'"]),
        ("/org", (200, {}, b""), ["X-Repo-Commit"]),
    ],
)
def test_other_answers(hub: Hub, start: str, answer: tuple[int, dict[str, str], bytes], words: list[str]) -> None:
    hub.answers[start] = answer
    message = fault(REPO)
    assert all(word in message for word in words), message


def test_no_server(serving: Serving) -> None:
    locate(REPO)
    serving.stop()
    message = fault(REPO)
    assert "download: found ConnectError" in message and "check the connection" in message
    assert f"what is in the cache loads by its commit: {REPO}@{NEW}" in message


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = locate(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert locate(found.pin or "") == found
    assert "offline mode (HF_HUB_OFFLINE is set)" in fault(REPO)
    assert "offline mode (HF_HUB_OFFLINE is set)" in fault(f"{REPO}@{OLD}")


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file")
    assert "NotADirectoryError" in fault(REPO)


# Content that is not what the hub said


def test_a_file_of_another_hash_is_refused_and_not_kept(hub: Hub) -> None:
    hub.says[WEIGHTS] = {"sha256": "f" * 64}
    for _ in range(2):
        message = fault(f"{REPO}@{NEW}")
        assert f"{WEIGHTS}: content: found" in message and "sha256 ffffffffffff... by the hub" in message
    assert hub.fetched().count(WEIGHTS) == 2
    hub.says.clear()
    assert value_of(locate(f"{REPO}@{NEW}")) == 1.0 and hub.fetched().count(WEIGHTS) == 3


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_of_another_size(hub: Hub, name: str) -> None:
    hub.says[name] = {"size": 77}
    assert f"{name}: content: found" in fault(REPO) and "77 bytes" in fault(REPO)


def test_a_file_that_was_damaged_in_the_cache_is_noticed(hub: Hub) -> None:
    found = locate(REPO)
    blob = Path(os.path.realpath(found.folder / WEIGHTS))
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert "it was taken out of the cache: try again" in fault(REPO)
    assert value_of(locate(REPO)) == 1.0


# A mixture


def test_a_mixture_is_the_files_of_its_manifest(serving: Serving, tmp_path: Path) -> None:
    hub = serving.hub
    hub.commits[NEW] = {**mixture(tmp_path / "made"), "notes.txt": b"x", f"experts/other/{WEIGHTS}": b"x"}
    found = locate(REPO)
    listed = ["README.md", "router.safetensors", EXPERT, f"experts/expert_0/{CONFIG}"]
    assert hub.fetched()[0] == MANIFEST and sorted(hub.fetched()[1:]) == sorted(listed)
    manifest = read_manifest(found.folder, found.root)
    assert torch.equal(read_tensors(found.folder, manifest, found.root)["router.safetensors"]["w"], torch.arange(3.0))
    with pytest.raises(AdapterError, match="leaves the folder"):
        read_tensors(found.folder, manifest)
    serving.stop()
    assert locate(found.pin or "") == found


def test_a_mixture_in_a_folder(hub: Hub, tmp_path: Path) -> None:
    files = mixture(tmp_path / "made")
    hub.commits[NEW] = {**adapter(), **{f"mix/a/{name}": content for name, content in files.items()}}
    found = locate(f"{REPO}/mix/a")
    assert found.pin == f"{REPO}/mix/a@{NEW}"
    assert read_tensors(found.folder, read_manifest(found.folder, found.root), found.root).keys() == {
        "router.safetensors",
        EXPERT,
    }


def test_a_manifest_over_the_cap(hub: Hub, tmp_path: Path) -> None:
    hub.commits[NEW] = mixture(tmp_path / "made")
    hub.says[MANIFEST] = {"size": MAX_MANIFEST + 1}
    assert f"{MANIFEST}: size" in fault(REPO) and not hub.fetched()


@pytest.mark.parametrize(
    ("name", "size"), [(EXPERT, MAX_FILE + 1), (f"experts/expert_0/{CONFIG}", MAX_CONFIG + 1), ("README.md", None)]
)
def test_a_file_of_a_mixture_over_the_cap(hub: Hub, tmp_path: Path, name: str, size: int | None) -> None:
    hub.commits[NEW] = mixture(tmp_path / "made")
    hub.says[name] = {"size": size}
    assert f"{name}: size" in fault(REPO) and hub.fetched() == [MANIFEST]


def test_a_mixture_without_one_of_its_files(hub: Hub, tmp_path: Path) -> None:
    hub.commits[NEW] = mixture(tmp_path / "made")
    del hub.commits[NEW][EXPERT]
    assert f"no {EXPERT}" in fault(REPO) and hub.fetched() == [MANIFEST]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "experts/../../secret.safetensors",
        f"experts/../{WEIGHTS}",
        f"experts/./{WEIGHTS}",
        f"experts//{WEIGHTS}",
        f"experts/a/b/{WEIGHTS}",
        f"experts/a b/{WEIGHTS}",
        "experts\\a\\" + WEIGHTS,
        "C:secret.safetensors",
        "experts/a/adapter_model.bin",
        "adapter_model.safetensors",
        "model.safetensors",
        "config.json",
        "routing.py",
        "router.safetensors.py",
        MANIFEST,
        "x" * 300,
        "",
    ],
)
def test_names_in_a_manifest_from_the_hub(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.commits[NEW] = relisted(mixture(tmp_path / "made"), name)
    assert f"{MANIFEST}: files: " in fault(REPO) and hub.fetched() == [MANIFEST]


# The cache is not trusted further than it reaches


def relink(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_that_leaves_the_cache(hub: Hub, tmp_path: Path, pinned: bool, name: str) -> None:
    found = locate(REPO)
    (tmp_path / "secret").write_bytes(adapter()[name])
    relink(found.folder / name, tmp_path / "secret")
    assert f"{name}: link: found a path that leaves" in fault(f"{REPO}@{NEW}" if pinned else REPO)
    assert (tmp_path / "secret").exists()


def test_a_link_into_the_cache_of_another_repository(hub: Hub) -> None:
    found = locate(REPO)
    other = Path(constants.HF_HUB_CACHE) / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_bytes(adapter()[WEIGHTS])
    relink(found.folder / WEIGHTS, other / "x")
    assert "link: found a path that leaves" in fault(f"{REPO}@{NEW}")


def test_a_manifest_that_is_such_a_link(hub: Hub, tmp_path: Path) -> None:
    hub.commits[NEW] = mixture(tmp_path / "made")
    relink(locate(REPO).folder / MANIFEST, tmp_path / "made" / MANIFEST)
    assert f"{MANIFEST}: link: found a path that leaves" in fault(f"{REPO}@{NEW}")


@pytest.mark.parametrize("pinned", [True, False])
def test_the_store_that_repositories_share(hub: Hub, pinned: bool) -> None:
    # Where a file came over Xet, the client keeps it once in <cache>/blobs, and links to it from the repository's.
    found = locate(REPO)
    blob = Path(os.path.realpath(found.folder / WEIGHTS))
    shared = Path(constants.HF_HUB_CACHE) / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(Path("../../blobs/ab") / shared.name)
    again = locate(f"{REPO}@{NEW}" if pinned else REPO)
    assert again == Located(found.folder, Path(constants.HF_HUB_CACHE), found.pin) and value_of(again) == 1.0


# Paths


@pytest.mark.parametrize("name", [REPO, f"{REPO}@main", "gpt2", "a b"])
def test_what_exists_is_a_local_folder(hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert locate(name) == Located(Path(name), None, None)
    assert locate(tmp_path / name) == Located(tmp_path / name, None, None)
    assert hub.seen == []


def test_a_broken_link_is_no_hub_id(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / REPO).symlink_to(tmp_path / "nowhere")
    assert locate(REPO).pin is None and hub.seen == []


def test_a_path_object_may_be_a_hub_id(hub: Hub) -> None:
    assert locate(Path(REPO)).pin == f"{REPO}@{NEW}"


@pytest.mark.parametrize(
    "entry",
    [
        "gpt2",
        "",
        "./org/lora",
        "../org/lora",
        "org/../lora",
        "org/lora/../x",
        "org/lora/",
        "org//lora",
        "/org/lora",
        "~/org/lora",
        "org/lora@",
        "org/lora@a b",
        "https://huggingface.co/org/lora",
        "org/lora\n",
        "org\\lora",
        "org/l\0ra",
    ],
)
def test_neither_a_path_nor_a_hub_id(hub: Hub, tmp_path: Path, entry: str) -> None:
    with pytest.raises(AdapterError) as caught:
        locate(entry)
    message = str(caught.value)
    assert "no such file or folder" in message and "org/name/sub/folder" in message
    assert os.path.abspath(entry) in message and hub.seen == []


@pytest.mark.parametrize("entry", ["org/lo--ra", f"org/lo--ra@{NEW}", "-org/lora", "org/lora.git", "org/" + "x" * 97])
def test_names_that_no_repository_has(hub: Hub, tmp_path: Path, entry: str) -> None:
    assert "no name of a repository" in fault(entry) and str(tmp_path / entry) in fault(entry)
    assert hub.seen == []


def test_a_mistyped_path_that_looks_like_a_hub_id_says_both(hub: Hub, tmp_path: Path) -> None:
    message = fault("out/run")
    assert f"none on {constants.ENDPOINT}" in message and f"no such folder ({tmp_path}/out/run)" in message
